"""The tools take any training script by its path: a copy in another folder, under another name."""

import shutil
import sys

import pytest
from PIL import Image

from tests.runs import PROMPT, ROOT, SIZE
from utils import demo, estimate_memory, preview_data
from utils.core.errors import UserError
from utils.devices import launch
from utils.lab import benchmark, compare_losses, fidelity, kill_and_resume
from utils.run import scripts
from utils.run.scripts import FULL, LORA, SCRIPTS


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """Copy the LoRA script to another folder, beside a module that it imports."""
    path = tmp_path / "experiments" / "my_experiment.py"
    path.parent.mkdir()
    text = SCRIPTS[LORA].read_text(encoding="utf-8")
    path.write_text(text + "\nfrom my_extra_module import ANSWER\n", encoding="utf-8")
    path.with_name("my_extra_module.py").write_text("ANSWER = 42\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield path
    for name in ("my_experiment", "my_extra_module"):
        sys.modules.pop(name, None)


def test_a_copy_is_loaded_with_what_lies_beside_it(copy):
    """It is the copy's own code, loaded once; it is named and run as what it is."""
    module = scripts.load_script(copy)
    assert module.ANSWER == 42 and module.__file__ == str(copy) and scripts.load_script(str(copy)) is module
    assert (scripts.method_of(copy), scripts.label_of(copy)) == (LORA, "my_experiment")


@pytest.mark.parametrize("method", SCRIPTS)
def test_the_two_scripts_have_short_names(method, monkeypatch, tmp_path):
    """In any case of letters, and from any folder."""
    monkeypatch.chdir(tmp_path)
    for text in (method, method.lower(), SCRIPTS[method].name, SCRIPTS[method]):
        path = scripts.find_script(text)
        assert path == ROOT / SCRIPTS[method].name
        assert (scripts.method_of(path), scripts.label_of(path)) == (method, method)


@pytest.mark.parametrize("text", ["train_dreambooth", "missing.py", "README.md", "utils"])
def test_what_is_no_script_is_refused(text):
    """With its name and an example."""
    with pytest.raises(UserError, match=rf"^{text} is not a training script. .* such as train_dreambooth_lora.py.$"):
        scripts.find_script(text)


def test_tools_for_users_take_a_copy(copy, tiny, tmp_path, capsys, monkeypatch):
    """The sheet, the estimate, and the demo's run."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(photos / "photo.png")
    flags = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", photos, "--instance_prompt", PROMPT]
    flags += ["--resolution", SIZE, "--output_dir", tmp_path / "out", "--report_to", "none", "--train_batch_size", "1"]
    sheet = tmp_path / "sheet.png"
    assert preview_data.main(["--output", str(sheet), "--count", "1", str(copy), *map(str, flags)]) == 0
    assert Image.open(sheet).height > SIZE
    assert estimate_memory.main(["--device", "cuda", str(copy), *map(str, flags)]) == 0
    assert f"{copy.name} --pretrained" in (told := capsys.readouterr().out) and "GB on cuda" in told
    started = []
    monkeypatch.setattr(launch, "run_script", lambda what, script, *_, **__: started.append(script) or sys.exit(0))
    with pytest.raises(SystemExit):
        demo.main(["--output", str(tmp_path / "demo"), "--script", str(copy)])
    assert started == [copy]


def test_the_lab_takes_a_copy(copy, tmp_path):
    """Each measurement runs the copy where it would run the script that it comes from."""
    for tool in (benchmark, fidelity):
        args = tool.parse_args(["--script", str(copy)])
        assert args.paths == {LORA: copy} and len(tool.chosen(args)) > 2
    assert {name.partition(",")[0] for name in benchmark.chosen(benchmark.parse_args(["--script", str(copy)]))} == {
        LORA
    }
    for tool in (compare_losses, kill_and_resume):
        assert tool.parse_args(["--scripts", str(copy), "full"]).scripts == [copy, SCRIPTS[FULL]]
    full = shutil.copy(SCRIPTS[FULL], tmp_path / "mine.py")
    assert fidelity.parse_args(["--script", str(full)]).paths == {FULL: full}


@pytest.mark.parametrize(
    ("tool", "flag"),
    [(benchmark, "--script"), (fidelity, "--script"), (compare_losses, "--scripts"), (kill_and_resume, "--scripts")],
)
def test_a_script_that_is_not_there_is_refused(tool, flag, capsys):
    """Before anything is written."""
    with pytest.raises(SystemExit, match="2"):
        tool.main([flag, "missing.py"])
    assert f"argument {flag}: missing.py is not a training script." in " ".join(capsys.readouterr().err.split())
