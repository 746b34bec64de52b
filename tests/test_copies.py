"""Copies of the scripts: made by the tool or by hand, here or in another folder, whole or lacking something."""

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.runs import ROOT, SCRIPTS, environment, read_metrics
from utils import new_experiment, preview_data
from utils.core import version_check

NEEDS = (
    "; this script needs its repository's utils/ (found: {}) and the packages of requirements.txt: "
    "git clone REPOSITORY_URL, and run it in that folder, or `pip install -e` that folder.\n"
)


def run_python(
    words: list, folder: Path, python: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess:
    """Run Python in a folder, where only what is there or installed is found."""
    known = environment(folder / "home") | variables
    return subprocess.run(
        [python, *map(str, words)], cwd=folder, env=known, capture_output=True, text=True, timeout=240
    )


@pytest.fixture
def experiments():
    """Name a file of the repository that a test may write, and remove it in the end."""
    path = ROOT / f"my_test_{os.getpid()}.py"
    yield path
    path.unlink(missing_ok=True)


# The tool.


@pytest.mark.parametrize("method", SCRIPTS)
def test_a_copy_is_the_script_without_marks_and_runs_at_once(method, trainer, experiments, tmp_path, capsys):
    """Nothing else differs but the docstring; training by the copy gives the original's losses."""
    assert new_experiment.main([str(experiments), "--from", method]) == 0
    said, text = capsys.readouterr().out, experiments.read_text()
    original = (ROOT / SCRIPTS[method]).read_text()
    assert "# Same in" not in text and os.access(experiments, os.X_OK) == os.access(ROOT / SCRIPTS[method], os.X_OK)
    trees = [ast.parse(source) for source in (original, text)]
    assert ast.dump(ast.Module(trees[0].body[1:], [])) == ast.dump(ast.Module(trees[1].body[1:], []))
    docstring = ast.get_docstring(trees[1])
    assert f"accelerate launch {experiments.name} " in docstring and f"Copy of {SCRIPTS[method]}" in docstring
    for tool in ("accelerate launch", "python -m utils.preview_data", "python -m utils.estimate_memory"):
        assert f"{tool} {experiments} --pretrained_model_name_or_path" in said
    assert "pip install" not in said
    trainer.run_all({tmp_path / "copy": (str(experiments), ""), tmp_path / "original": (method, "")})
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("copy", "original")]
    assert losses[0] == losses[1]


@pytest.fixture
def repository(tmp_path) -> Path:
    """Make a repository with one script in it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.py").write_text('"""Train."""\n\n\n# Same in train_dreambooth.py\nx = """\n# Same inside\n"""\n')
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "Begin")
    return folder


def git(folder: Path, *words: str) -> str:
    """Run git."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    return subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_the_docstring_tells_the_commit_and_whether_there_were_changes(repository, tmp_path, monkeypatch):
    """And why it cannot, if git is absent or the script is in no repository."""
    source, start = repository / "train.py", '"""Train.\n\nCopy of train.py'
    commit = git(repository, "log", "-1", "--format=%H of %cs")
    new_experiment.main([str(tmp_path / "my_1.py"), "--from", str(source)])
    rest = '\n"""\n\n\nx = """\n# Same inside\n"""\n'
    assert (tmp_path / "my_1.py").read_text() == f"{start} at commit {commit}.{rest}"
    (repository / "notes.txt").write_text("untracked")
    new_experiment.main([str(tmp_path / "my_2.py"), "--from", str(source)])
    assert (tmp_path / "my_2.py").read_text() == f"{start} at commit {commit}.{rest}"
    source.write_text(source.read_text() + "y = 1\n")
    new_experiment.main([str(tmp_path / "my_3.py"), "--from", str(source)])
    assert f"{start} at commit {commit}, with uncommitted changes in its tree." in (tmp_path / "my_3.py").read_text()
    alone = tmp_path / "alone.py"
    alone.write_text("x = 1\n")
    new_experiment.main([str(tmp_path / "my_4.py"), "--from", str(alone)])
    unknown = '"""Copy of alone.py; the commit is unknown because git finds no repository there."""\n\nx = 1\n'
    assert (tmp_path / "my_4.py").read_text() == unknown
    monkeypatch.setenv("PATH", str(tmp_path))
    new_experiment.main([str(tmp_path / "my_5.py"), "--from", str(source)])
    assert f"{start}; the commit is unknown because git is not installed." in (tmp_path / "my_5.py").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/there.py"], "there.py exists, and is left as it is. Choose another name."),
        (["{}/link.py"], "link.py exists"),
        (["{}/my_copy"], "my_copy must end in .py."),
        (["{}/random.py"], "random.py would hide the module random from the script. Choose another name."),
        (["{}/torch.py"], "torch.py would hide the module torch"),
        (["{}/utils.py"], "utils.py would hide the module utils"),
        (["{}/my_copy.py", "--from", "lorra"], "lorra is not a training script. Give the path of a .py file"),
    ],
)
def test_nothing_is_overwritten_or_hidden(words, message, tmp_path):
    """The message says what to do; no file is written."""
    (tmp_path / "there.py").write_text("mine")
    (tmp_path / "link.py").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=re.escape(message)):
        new_experiment.main([word.format(tmp_path) for word in words])
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.py").read_text() == "mine"


def test_a_copy_elsewhere_is_told_how_it_finds_utils(tmp_path, capsys):
    """And that another utils/ there stands in its way; a folder without code does not."""
    line = f"To find utils/ from there, once: pip install -e {ROOT}\n"
    (tmp_path / "utils").mkdir()
    new_experiment.main([str(tmp_path / "my_1.py")])
    said = capsys.readouterr().out
    assert line in said and "hides" not in said
    (tmp_path / "utils/__init__.py").touch()
    new_experiment.main([str(tmp_path / "my_2.py")])
    hides = f"But {tmp_path}/utils/__init__.py hides the utils/ that the script needs: rename it, or move the copy.\n"
    assert line + hides in capsys.readouterr().out


# A script without its utils/.


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("found", ["none", "foreign", "module", "older"])
def test_a_script_without_its_own_utils_ends_with_one_sentence(method, found, tmp_path):
    """It says what is missing, which utils/ was found, and how to get the right one; there is no traceback."""
    script = tmp_path / "my_script.py"
    shutil.copy(ROOT / SCRIPTS[method], script)
    utils, place, reason = tmp_path / "utils", "none", "No module named 'utils'"
    if found == "foreign":
        utils.mkdir()
        (utils / "__init__.py").write_text("def mine(): pass\n")
        place, reason = utils / "__init__.py", "No module named 'utils.core'"
    if found == "module":
        place, reason = tmp_path / "utils.py", "No module named 'utils.core'; 'utils' is not a package"
        place.touch()
    if found == "older":
        shutil.copytree(ROOT / "utils", utils)
        captions = utils / "data/captions.py"
        captions.write_text(captions.read_text().replace("find_captions", "find_words"))
        place, reason = utils / "__init__.py", "utils.data.captions has no find_captions"
    done = run_python([script, "--help"], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {reason}{NEEDS.format(place)}")


def test_names_that_a_script_binds_itself_are_not_looked_for(tmp_path):
    """A variable may be called as a module of utils/ is; the module's own names are looked for elsewhere."""
    script = tmp_path / "script.py"
    head = "from utils.core import errors, seeds as s\n"
    script.write_text(f"{head}def f(errors):\n    return errors.nothing\nx = s.derive_seed(errors.SHOWN)\n")
    version_check.check_names_used(str(script))
    for wrong in ("errors.nothing", "s.nothing"):
        script.write_text(f"{head}def f():\n    return {wrong}\n")
        with pytest.raises(ImportError, match=r"utils\.core\.(errors|seeds) has no nothing"):
            version_check.check_names_used(str(script))


# Installed, so that copies can live elsewhere.


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, str]:
    """Install a copy of the repository in an environment of its own; return the copy, and the interpreter."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "repository"
    shutil.copytree(ROOT / "utils", source / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", *SCRIPTS.values()):
        shutil.copy(ROOT / name, source / name)
    venv.create(folder / "venv")
    python = folder / "venv/bin/python"
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    # All packages of this environment; its own editable installs come later on the path.
    paths = [path for path in sys.path if "site-packages" in path]
    (site / "zz_parent.pth").write_text("\n".join(paths))
    command = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e", source]
    done = run_python(command, folder, str(python))
    assert done.returncode == 0, done.stdout + done.stderr
    return source, str(python)


def test_an_editable_install_lets_a_copy_live_elsewhere(installed, tiny, photos, tmp_path):
    """It trains there; a folder utils/ without code is not in its way, one with code ends it with one sentence."""
    source, python = installed
    done = run_python(["-m", "utils.new_experiment", tmp_path / "my_copy.py"], tmp_path, python)
    assert done.returncode == 0 and f"pip install -e {source}" in done.stdout, done.stderr
    (tmp_path / "utils").mkdir()
    words = (
        f"--pretrained_model_name_or_path {tiny} --instance_data_dir {photos} --instance_prompt dog --resolution 64"
    )
    words = [*words.split(), *f"--max_train_steps 1 --report_to none --output_dir {tmp_path / 'out'}".split()]
    done = run_python(["-m", "utils.preview_data", "my_copy.py", *words], tmp_path, python)
    assert (done.returncode, done.stdout) == (0, "data-preview.png\n"), done.stderr
    done = run_python(["my_copy.py", *words], tmp_path, python)
    assert done.returncode == 0 and (tmp_path / "out/metrics.jsonl").is_file(), done.stderr
    (tmp_path / "utils/__init__.py").touch()
    done = run_python(["my_copy.py", "--help"], tmp_path, python)
    needs = NEEDS.format(tmp_path / "utils/__init__.py")
    assert (done.returncode, done.stderr) == (1, f"error: No module named 'utils.core'{needs}")


def test_an_install_names_what_is_needed(installed):
    """The packages of requirements.txt, at their versions; a name that nobody else has."""
    source, python = installed
    code = "from importlib.metadata import requires; print(*requires('dreambooth-training-scripts'), sep='\\n')"
    asked = run_python(["-c", code], source, python).stdout.splitlines()
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert [line.replace(" ", "") for line in asked] == [line.replace(" ", "") for line in lines]


# What checks of the project leave alone.


def test_ruff_leaves_copies_alone(tmp_path):
    """Lint and format pass over my_*.py in any folder, also without git; other files are looked at."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "experiments").mkdir()
    for name in ("my_copy.py", "experiments/my_copy.py", "other.py"):
        (tmp_path / name).write_text("import os\nx  =  1\n")
    for words in (["check"], ["format", "--check"]):
        done = run_python(["-m", "ruff", *words, "."], tmp_path)
        assert done.returncode == 1 and "other.py" in done.stdout and "my_copy" not in done.stdout, done.stderr


def test_lint_looks_at_tracked_files_only():
    """A copy under any name that is not added to git is no matter of the project."""
    listed = git(ROOT, "ls-files", "*.py").split("\n")
    untracked = ROOT / f"test_untracked_{os.getpid()}.py"
    untracked.touch()
    try:
        said = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    finally:
        untracked.unlink()
    for line in (line.split() for line in said.splitlines() if "/ruff " in line):
        assert [word for word in line if word.endswith(".py")] == [name for name in listed if (ROOT / name).is_file()]
    assert said.count("/ruff ") == 2


def test_copies_are_ignored_by_git():
    """So `git add .` does not take them along."""
    assert git(ROOT, "check-ignore", "my_copy.py", "experiments/my_copy.py", "x.egg-info/PKG-INFO").count("\n") == 2


def test_a_hand_made_copy_is_previewed(experiments, tiny, photos, tmp_path, monkeypatch, capsys):
    """Under any name and in any folder, named by its path."""
    script = tmp_path / "any name.py"
    shutil.copy(ROOT / SCRIPTS["full"], script)
    words = (
        f"--pretrained_model_name_or_path {tiny} --instance_data_dir {photos} --instance_prompt dog --resolution 64"
    )
    assert preview_data.main(["--output", str(tmp_path / "sheet.png"), str(script), *words.split()]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'sheet.png'}\n" and (tmp_path / "sheet.png").is_file()
