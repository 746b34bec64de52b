"""The shape of the two scripts and of utils/, measured on their syntax trees."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import list_sources
from utils.check_sync import read_script

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train_dreambooth.py", "train_dreambooth_lora.py")
MAKES_BASE_MODELS, MAKES_PARSERS = "utils/lab/train_parts.py", "utils/flags/command_line.py"
TRACKS_MEMORY = "utils/memory/memory_estimate.py"  # runs a script's own step, without content
COMPARES_LAYERS = "utils/lab/compare_quantized_layers.py"  # trains a U-Net on others' layers, which no script has
TRAINS = (MAKES_BASE_MODELS, TRACKS_MEMORY, COMPARES_LAYERS)
UTILS = sorted(name for name in list_sources() if name.startswith("utils/"))
# In the order of imports: a room imports from itself and from those before it. Tools lie directly in utils/.
ROOMS = "core flags optim devices data models hub run memory sampling synthetic evaluation lab".split()
TOOL = "tool"
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCK = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)

SCRIPT_LINES, UTILS_LINES = 1750, 400
FUNCTION_LINES, FUNCTION_LINES_OF = 60, {"main": 80}
DEPTH, DEPTH_OF = 3, {"train": 4}
PARAMETERS = 8

# Run by path, a module in utils/ puts its folder first on sys.path: one of these names would hide the real module.
TAKEN_NAMES = sys.stdlib_module_names | {
    *("accelerate", "bitsandbytes", "datasets", "diffusers", "huggingface_hub", "numpy", "peft", "PIL"),
    *("safetensors", "tensorboard", "tokenizers", "torch", "transformers", "wandb"),
}
GROUP = "add_.*_args"  # names of the functions that add flags, and what those that they are given preset
SWITCH = ast.parse("partial(add, action=argparse.BooleanOptionalAction, default=False)", mode="eval").body
PRESETS = {"add": [], "switch": SWITCH.keywords}
FLAG_MEANING = ("help", "type", "choices", "action", "nargs")
METHODS_OWN = {"METHOD", "METHOD_TAGS", "DEFAULT_OUTPUT_DIR", "DEFAULT_LEARNING_RATE", "TRAINS_WHOLE_NETWORKS"}
UNTESTED_FLAGS: dict[str, str] = {}  # flag: why no test names it
MACHINE_PATH = re.compile(r"(?<![\w.~*)}\]/-])/(?:work|root|tmp/venv)(?![\w-])")


# The rules: each takes a module's syntax tree and returns one message per breach.


def find_long_functions(tree: ast.Module) -> list[str]:
    """Return the functions that are longer than a screen or two, docstring included."""
    sizes = [(node, node.end_lineno - node.lineno + 1) for node in functions(tree)]
    return [
        f"line {node.lineno}: {node.name} has {lines} lines"
        for node, lines in sizes
        if lines > FUNCTION_LINES_OF.get(node.name, FUNCTION_LINES)
    ]


def find_deep_functions(tree: ast.Module) -> list[str]:
    """Return the functions whose control flow nests too deep."""
    return [
        f"line {node.lineno}: {node.name} is {depth(node)} blocks deep"
        for node in functions(tree)
        if depth(node) > DEPTH_OF.get(node.name, DEPTH)
    ]


def find_wide_functions(tree: ast.Module) -> list[str]:
    """Return the functions with too many parameters."""
    return [
        f"line {node.lineno}: {node.name} takes {', '.join(parameters(node))}"
        for node in functions(tree)
        if len(parameters(node)) > PARAMETERS
    ]


def find_nested_functions(tree: ast.Module) -> list[str]:
    """Return the functions inside functions, and the lambdas that have a name."""
    inner = {child for node in functions(tree) for child in functions(node) if child is not node}
    assignments = (ast.Assign, ast.AnnAssign, ast.NamedExpr)
    named = [node for node in ast.walk(tree) if isinstance(node, assignments) and isinstance(node.value, ast.Lambda)]
    return [f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}" for node in [*inner, *named]]


def find_missing_docstrings(tree: ast.Module) -> list[str]:
    """Return the functions and classes whose docstring does not start with a sentence."""
    documented = [node for node in ast.walk(tree) if isinstance(node, (*FUNCTION, ast.ClassDef))]
    return [
        f"line {node.lineno}: {node.name}"
        for node in documented
        if not re.search(r"\.(\s|$)", (ast.get_docstring(node) or "").split("\n\n")[0])
    ]


def find_changes_of_args(tree: ast.Module) -> list[str]:
    """Return the places outside `parse_args` that change the parsed flags."""
    parsing = {node for function in functions(tree) if function.name == "parse_args" for node in ast.walk(function)}
    changes = [node for node in ast.walk(tree) if node not in parsing and changes_args(node)]
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in changes]


def find_asserts_and_bare_excepts(tree: ast.Module) -> list[str]:
    """Return the checks that `python -O` removes and the handlers that also catch Ctrl-C."""
    bare = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    return [f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}" for node in bare + asserts]


def find_imports_of_scripts(tree: ast.Module) -> list[str]:
    """Return the imports of a training script."""
    return [f"imports {name}" for name in sorted(imports(tree)) if f"{name}.py" in SCRIPTS]


def find_unreadable_flags(tree: ast.Module) -> list[str]:
    """Return the calls that add a flag in a way that the rules for flags would overlook."""
    found = argument_calls(tree)
    unwritten = [call for call in found if not call.args or not all(isinstance(a, ast.Constant) for a in call.args)]
    groups = [function for function in functions(tree) if re.fullmatch(GROUP, function.name)]
    unknown = [call for group in groups for call in calls(group) if call not in found and written_flags(call)]
    return [f"line {call.lineno}: {ast.unparse(call)}" for call in unwritten + unknown]


def find_training(tree: ast.Module) -> list[str]:
    """Return the calls that belong into a training loop."""
    methods = [call for call in calls(tree) if isinstance(call.func, ast.Attribute)]
    return [
        f"line {call.lineno}: {ast.unparse(call)}" for call in methods if call.func.attr in ("backward", "prepare")
    ]


def find_flags_in_nouns(tree: ast.Module) -> list[str]:
    """Return what a module that is no program of its own has to do with parsed flags."""
    if any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body):
        return []
    takers = [node for node in functions(tree) if "args" in parameters(node)]
    return [f"line {node.lineno}: {node.name} takes args" for node in takers] + [
        "imports argparse" for name in imports(tree) if name == "argparse"
    ]


def find_imports_against_the_order(tree: ast.Module, module: str) -> list[str]:
    """Return the imports that the order of rooms forbids: of a later room, of the lab by a tool, of any tool.

    Args:
        module: The path of the file in this repository. A script is like a tool.
    """
    room, names = room_of(module), sorted(utils_imports(tree, module))
    allowed = [one for one in ROOMS if one != "lab"] if room == TOOL else ROOMS[: ROOMS.index(room) + 1]
    return [f"imports {name}" for name in names if room_of(name.replace(".", "/")) not in allowed]


def find_no_room(module: str) -> list[str]:
    """Return a message if a file lies neither directly in utils/ nor directly in a room."""
    parts = Path(module).parts[1:]
    return [] if len(parts) == 1 or (len(parts) == 2 and parts[0] in ROOMS) else [f"{module} is in no room"]


def find_more_than_a_paragraph(tree: ast.Module) -> list[str]:
    """Return what keeps the `__init__.py` of a room from being a docstring and nothing else."""
    missing = [] if ast.get_docstring(tree) else ["no docstring says what lives here"]
    extra = tree.body[1:] if not missing else tree.body
    return missing + [f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}" for node in extra]


# What the rules are made of.


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the functions and methods in a tree, itself included."""
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]


def depth(node: ast.AST) -> int:
    """Return how deep blocks nest in a node; an elif is as deep as its if."""
    return max((depth(child) + opens_block(child, node) for child in ast.iter_child_nodes(node)), default=0)


def opens_block(node: ast.AST, parent: ast.AST) -> bool:
    """Tell whether a node's body is indented one level further than its parent's."""
    is_elif = isinstance(node, ast.If) and isinstance(parent, ast.If) and node.col_offset == parent.col_offset
    return isinstance(node, BLOCK) and not is_elif


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the names that a caller can pass, without the stars and without self and cls."""
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    rest = [f"*{argument.arg}" for argument in (node.args.vararg, node.args.kwarg) if argument]
    return [argument.arg for argument in named if argument.arg not in ("self", "cls")] + rest


def imports(tree: ast.Module) -> set[str]:
    """Return the top-level names of the modules that are imported anywhere in a tree."""
    plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    direct = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in plain + direct}


def utils_imports(tree: ast.Module, module: str) -> set[str]:
    """Return the dotted names that a file imports from utils, with the name that is taken from a module."""
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parents = list(Path(module).parts[: -node.level]) if node.level else []
            start = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{start}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "utils"}


def room_of(path: str) -> str:
    """Return the room in which a file or module of utils/ lies, "tool" if it lies in none."""
    parts = Path(path).parts
    return parts[1] if parts[0] == "utils" and len(parts) > 1 and parts[1] in ROOMS else TOOL


def changes_args(node: ast.AST) -> bool:
    """Tell whether a node sets or deletes an attribute of `args`."""
    if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
        return ast.unparse(node.value) in ("args", "self.args", "vars(args)", "args.__dict__")
    if not isinstance(node, ast.Call):
        return False
    return ast.unparse(node).startswith(
        ("setattr(args,", "delattr(args,", "vars(args).update", "args.__dict__.update")
    )


def calls(tree: ast.AST) -> list[ast.Call]:
    """Return the calls in a tree."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def short_names(tree: ast.Module) -> dict[str, list[ast.keyword]]:
    """Return other names of `add_argument` and what they preset.

    They are assigned (`add, switch = group.add_argument, partial(…)`), or what a script's `add_…_args` is given.
    """
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    sides = [[getattr(side, "elts", [side]) for side in (node.targets[0], node.value)] for node in assigned]
    pairs = [(ast.unparse(name), value) for names, values in sides for name, value in zip(names, values, strict=False)]
    found = {name: getattr(value, "keywords", []) for name, value in pairs if is_adder(value)}
    groups = [node for node in functions(tree) if re.fullmatch(GROUP, node.name)]
    found |= {name: PRESETS[name] for node in groups for name in parameters(node) if name in PRESETS}
    partials = [(name, value) for name, value in pairs if is_partial_of(value, found)]
    return found | {name: [*found[ast.unparse(value.args[0])], *value.keywords] for name, value in partials}


def is_partial_of(node: ast.AST, names: dict) -> bool:
    """Tell whether an expression is `partial(…)` of one of these names."""
    is_partial = isinstance(node, ast.Call) and ast.unparse(node.func) in ("partial", "functools.partial")
    return is_partial and bool(node.args) and ast.unparse(node.args[0]) in names


def is_adder(node: ast.AST) -> bool:
    """Tell whether an expression is `x.add_argument` or a partial of it."""
    return re.search(r"\.add_argument(?!\w|\()", ast.unparse(node)) is not None


def argument_calls(tree: ast.Module) -> list[ast.Call]:
    """Return the calls of `add_argument`, also under a short name."""
    short = short_names(tree)
    return [call for call in calls(tree) if is_adder(call.func) or ast.unparse(call.func) in short]


def written_flags(call: ast.Call) -> list[str]:
    """Return the flags among a call's arguments."""
    texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return [text for text in texts if isinstance(text, str) and text.startswith("--")]


def flags(tree: ast.Module) -> dict[str, dict[str, str]]:
    """Return the meaning of every flag: the source text of the keywords that define it."""
    short = short_names(tree)
    keywords = {call: [*short.get(ast.unparse(call.func), []), *call.keywords] for call in argument_calls(tree)}
    return {
        flag: {word.arg: ast.unparse(word.value) for word in keywords[call] if word.arg in FLAG_MEANING}
        for call in keywords
        for flag in written_flags(call)
    }


def differing_flags(one: dict[str, dict[str, str]], other: dict[str, dict[str, str]]) -> list[str]:
    """Return the flags that two scripts share but define differently."""
    return [f"{flag}: {one[flag]} != {other[flag]}" for flag in one if flag in other and one[flag] != other[flag]]


def named_flags(text: str) -> set[str]:
    """Return the flags that a text names, the switched-off ones without their no-."""
    return {f"--{name}" for name in re.findall(r"(?<![\w-])--(?:no-)?(\w[\w-]*)", text)}


def parse(name: str) -> ast.Module:
    """Return the syntax tree of a file of this repository."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


# The project keeps the rules.

SCRIPT_RULES = (
    find_long_functions,
    find_deep_functions,
    find_wide_functions,
    find_nested_functions,
    find_missing_docstrings,
    find_changes_of_args,
    find_asserts_and_bare_excepts,
    find_imports_of_scripts,
    find_unreadable_flags,
)


@pytest.mark.parametrize("rule", SCRIPT_RULES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_script_keeps_the_rule(script, rule):
    """Both scripts can be read: short, flat, documented, without hidden state."""
    problems = rule(parse(script))
    assert not problems, "\n".join([script, *problems])


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_short_enough_to_copy(script):
    """A script stays a file that one person reads."""
    lines = (ROOT / script).read_text(encoding="utf-8").count("\n")
    assert lines <= SCRIPT_LINES


@pytest.mark.parametrize("rule", [find_training, find_flags_in_nouns])
@pytest.mark.parametrize("module", UTILS)
def test_utils_hold_mechanics_only(module, rule):
    """Nothing in utils/ trains but the files in `TRAINS`, and its nouns know nothing of the flags.

    The one that makes the scripts' parsers needs argparse for it, but takes no flags either.
    """
    problems = rule(parse(module)) if rule is not find_training or module not in TRAINS else []
    allowed = ["imports argparse"] if (rule, module) == (find_flags_in_nouns, MAKES_PARSERS) else []
    assert problems == allowed, "\n".join([module, *problems])


@pytest.mark.parametrize("module", [*UTILS, *SCRIPTS])
def test_rooms_import_one_way(module):
    """A room imports no later one and no tool, a tool or a script neither a tool nor the lab."""
    problems = find_imports_against_the_order(parse(module), module)
    assert not problems, "\n".join([module, *problems])


@pytest.mark.parametrize("module", UTILS)
def test_a_file_of_utils_is_short_and_has_its_place(module):
    """It is a tool or in a room, and holds one thought."""
    lines = (ROOT / module).read_text(encoding="utf-8").count("\n")
    assert not find_no_room(module) and lines <= UTILS_LINES, f"{module}: {lines} lines"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_lives_there_and_imports_nothing(room):
    """So importing one of its modules imports no other, and modules have no order within a room."""
    assert find_more_than_a_paragraph(parse(f"utils/{room}/__init__.py")) == []


def test_utils_shadow_no_other_module():
    """No module in utils/ has the name of a standard or an installed one."""
    names = {part for module in UTILS for part in Path(module).with_suffix("").parts[1:]}
    assert names and not names & TAKEN_NAMES


def test_every_flag_occurs_in_a_test():
    """Each flag is named below tests/, or it is said why not."""
    paths = [path for path in (ROOT / "tests").rglob("*") if path.is_file() and path != Path(__file__)]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.suffix != ".pyc"]
    # --config is added by what makes the parsers.
    known = {flag for module in (*SCRIPTS, MAKES_PARSERS) for flag in flags(parse(module))}
    tested = named_flags("\n".join(texts))
    assert known >= {"--config", "--instance_data_dir", "--center_crop", "--rank"}
    assert sorted(known - tested - set(UNTESTED_FLAGS)) == []
    assert sorted(set(UNTESTED_FLAGS) - (known - tested)) == [], "these need no exemption any more"


def test_shared_flags_mean_the_same():
    """A flag that both scripts have is the same flag; only its default may differ."""
    assert differing_flags(*(flags(parse(script)) for script in SCRIPTS)) == []


def test_constants_of_both_scripts_are_equal():
    """What is no method's own has one value; `check_sync` looks at functions only."""
    first, second = (
        {one.name: one.lines for one in read_script(ROOT / script).definitions if not one.is_code}
        for script in SCRIPTS
    )
    assert {name for name in first.keys() & second.keys() if first[name] != second[name]} == METHODS_OWN


def test_no_file_names_a_path_of_one_machine():
    """No tracked text mentions a folder of the machine on which it was written."""
    if not shutil.which("git"):
        pytest.skip("git, which lists the files, is not installed")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listing.stdout.split("\0") if (ROOT / name).is_file()]
    if not paths:
        pytest.skip(f"git tracks no files here. {listing.stderr.strip()}")
    found = [
        f"{path}:{number}: {line}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "\n".join(found)


# The rules find what they are for, and nothing else.

BREACHES = [
    (find_long_functions, "def f():\n" + "    x = 1\n" * 60),
    (find_long_functions, "class C:\n    def main(self):\n" + "        x = 1\n" * 80),
    (find_deep_functions, "def f():\n  for a in b:\n    with a:\n      try:\n        if a: pass\n      finally: pass"),
    (find_deep_functions, "def train():\n  if a:\n    if a:\n      if a:\n        if a:\n          while a: pass"),
    (
        find_deep_functions,
        "def f():\n  if a:\n    pass\n  else:\n    if a:\n      if a:\n        match a:\n          case 1: pass",
    ),
    (find_wide_functions, "def f(a, b, c, d, /, e, *, f, g, h, i): pass"),
    (find_wide_functions, "def f(a, b, c, d, e, f, g, *h, **i): pass"),
    (find_nested_functions, "def f():\n    def g(): pass"),
    (find_nested_functions, "def f():\n    class C:\n        def g(self): pass"),
    (find_nested_functions, "f = lambda: 1"),
    (find_missing_docstrings, "def f():\n    pass"),
    (find_missing_docstrings, "class C:\n    x = 1"),
    (find_missing_docstrings, 'def f():\n    """Args: a"""'),
    (find_missing_docstrings, 'def f():\n    """Do it\n\n    Later. """'),
    (find_missing_docstrings, 'class C:\n    """Hold it."""\n    def f(self): pass'),
    (find_changes_of_args, "def main(args):\n    args.seed = 1"),
    (find_changes_of_args, "args.seed += 1"),
    (find_changes_of_args, "args.a, b = 1, 2"),
    (find_changes_of_args, "del args.seed"),
    (find_changes_of_args, "setattr(args, name, 1)"),
    (find_changes_of_args, "vars(args)['seed'] = 1"),
    (find_changes_of_args, "vars(args).update(seed=1)"),
    (find_asserts_and_bare_excepts, "assert x"),
    (find_asserts_and_bare_excepts, "try:\n    pass\nexcept:\n    pass"),
    (find_imports_of_scripts, "import train_dreambooth"),
    (find_imports_of_scripts, "def f():\n    from train_dreambooth_lora import main"),
    (find_unreadable_flags, "parser.add_argument(f'--{name}')"),
    (find_unreadable_flags, "add = group.add_argument\nadd(*names)"),
    (find_unreadable_flags, "def add_data_args(add, switch):\n    switch(*names)"),
    (find_unreadable_flags, "def add_data_args(group):\n    switch(group, '--x')"),
    (find_unreadable_flags, "def add_data_args(add):\n    unset = partial(switch, default=None)\n    unset('--x')"),
    (find_training, "accelerator.backward(loss)"),
    (find_training, "unet = accelerator.prepare(unet)"),
    (find_flags_in_nouns, "import argparse"),
    (find_flags_in_nouns, "from argparse import Namespace"),
    (find_flags_in_nouns, "def f(args): pass"),
]
KEPT = [
    (find_long_functions, "@cache\ndef f():\n" + "    x = 1\n" * 59),
    (find_long_functions, "def main():\n" + "    x = 1\n" * 79),
    (
        find_deep_functions,
        "def f():\n  for a in b:\n    with a:\n      if a: pass\n      elif b: pass\n      elif c: pass",
    ),
    (find_deep_functions, "def train():\n  if a:\n    if a:\n      if a:\n        if a: pass"),
    (find_wide_functions, "def f(self, a, b, c, d, e, f, g, *h): pass"),
    (find_nested_functions, "class C:\n    def f(self): return sorted(x, key=lambda y: -y)"),
    (find_missing_docstrings, 'def f():\n    """Do it, e.g. over\n    two lines. Or more.\n\n    Args: a\n    """'),
    (find_changes_of_args, "def parse_args():\n    args.seed = 1"),
    (find_changes_of_args, "self.seed = args.seed\nargs = parse_args()\nprint(vars(args).items())"),
    (find_asserts_and_bare_excepts, "try:\n    pass\nexcept OSError:\n    pass"),
    (find_imports_of_scripts, "import torch\nfrom utils import images"),
    (find_unreadable_flags, "parser.add_argument('-x', '--x', type=int)\nadd(name)"),
    (
        find_unreadable_flags,
        "def add_x_args(add):\n  unset = partial(add, default=None)\n  unset('--x')\nadd = group.add_argument",
    ),
    (find_unreadable_flags, "def add_x_args(add, switch):\n  unset = partial(switch, default=None)\n  unset('--x')"),
    (find_training, "scheduler.step(noise, t, sample)\npipeline.prepare_latents()"),
    (find_flags_in_nouns, "import argparse\ndef f(args): pass\nif __name__ == '__main__':\n    f()"),
    (find_flags_in_nouns, "def f(*args): pass"),
]


@pytest.mark.parametrize(("rule", "source"), BREACHES)
def test_rule_finds_a_breach(rule, source):
    """One breach gives one message."""
    assert len(rule(ast.parse(source))) == 1


FORBIDDEN = [
    ("utils/core/a.py", "from utils.devices import launch"),
    ("utils/core/a.py", "import utils.devices.launch"),
    ("utils/core/a.py", "def f():\n    from utils.devices.launch import connect"),
    ("utils/core/a.py", "from ..data import images"),
    ("utils/evaluation/a.py", "from utils.lab import fidelity"),
    ("utils/lab/a.py", "from utils.demo import MODEL"),
    ("utils/data/a.py", "from utils import sample"),
    ("utils/sample.py", "from utils.evaluate import main"),
    ("utils/sample.py", "from utils.lab.benchmark import find_reason"),
    ("utils/sample.py", "from . import demo"),
    ("train_dreambooth.py", "from utils import sample"),
    ("train_dreambooth.py", "from utils.lab import step_timing"),
]
ALLOWED = [
    ("utils/devices/a.py", "import torch\nfrom utils.core import seeds\nfrom utils.devices import launch"),
    (
        "utils/lab/a.py",
        "from utils.evaluation.exam import ask\nfrom utils.lab import fidelity\nfrom . import benchmark",
    ),
    ("utils/sample.py", "import utils.core.quick_imports\nfrom utils.evaluation import exam\nfrom .core import seeds"),
    ("train_dreambooth.py", "import utils.core.quick_imports\nfrom utils.run import checkpoints"),
]


@pytest.mark.parametrize(("module", "source"), FORBIDDEN)
def test_an_import_against_the_order_is_found(module, source):
    """One breach gives one message."""
    assert len(find_imports_against_the_order(ast.parse(source), module)) == 1


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_an_import_in_the_order_passes(module, source):
    """A room may import itself and those before it."""
    assert find_imports_against_the_order(ast.parse(source), module) == []


@pytest.mark.parametrize("module", ["utils/attic/a.py", "utils/core/deep/a.py"])
def test_a_file_outside_of_the_rooms_is_found(module):
    """A new folder is a new room, which has a place in the order."""
    assert len(find_no_room(module)) == 1
    assert find_no_room("utils/core/a.py") == find_no_room("utils/sample.py") == []


@pytest.mark.parametrize("source", ["", "import torch", '"""Here live errors."""\nfrom utils.core import errors'])
def test_more_than_a_paragraph_is_found(source):
    """A room without a docstring, or one that imports, gives a message."""
    assert find_more_than_a_paragraph(ast.parse(source))
    assert find_more_than_a_paragraph(ast.parse('"""Here live errors."""\n')) == []


@pytest.mark.parametrize(("rule", "source"), KEPT)
def test_rule_lets_good_code_pass(rule, source):
    """What is just within the limits gives no message."""
    assert rule(ast.parse(source)) == []


def test_flags_are_read_with_their_meaning():
    """Flags are found under every spelling of the call; how their text is broken into lines does not matter."""
    names = "add, switch = group.add_argument, partial(group.add_argument, action=SWITCH, default=False)\n"
    one = flags(
        ast.parse(
            f"{names}add('--a', type=int, default=1, help='One ' 'line.')\nswitch('--b')\nadd('-c', '--c')\n"
            "unset = partial(switch, default=None)\nunset('--d', help='Or not.')"
        )
    )
    two = flags(ast.parse("group.add_argument('--a', default=2, help='One line.', type=int)\nother.add('--d')"))
    given = (
        "def add_x_args(add, switch):\n  unset = partial(switch, default=None)\n  add('--a', type=int)\n  unset('--b')"
    )
    action = {"action": "argparse.BooleanOptionalAction"}
    assert flags(ast.parse(given)) == {"--a": {"type": "int"}, "--b": action}
    assert flags(ast.parse("def other(add, switch):\n  add('--a')")) == {}
    assert one == {"--a": {"type": "int", "help": "'One line.'"}, "--b": {"action": "SWITCH"}, "--c": {}} | {
        "--d": {"action": "SWITCH", "help": "'Or not.'"}
    }
    assert set(two) == {"--a"} and differing_flags(one, two) == []
    assert len(differing_flags(one, {"--a": {"type": "float", "help": "'One line.'"}})) == 1
    assert len(differing_flags(one, {"--a": {"type": "int"}})) == 1
    assert len(differing_flags(one, {"--b": {}})) == 1


def test_a_longer_flag_does_not_count_for_a_shorter_one():
    """Flags in a text are whole words."""
    assert named_flags("['--lr_power=2', '--no-center_crop'] x--y --") == {"--lr_power", "--center_crop"}


@pytest.mark.parametrize("text", ["cd @work/main", "'@root/x'", "PATH=@tmp/venv/bin", "(@work)"])
def test_machine_paths_are_found(text):
    """A path counts wherever it starts."""
    assert MACHINE_PATH.search(text.replace("@", "/"))


@pytest.mark.parametrize(
    "text", ["https://x.org@work", "{folder}@root", "@workspace", "@tmp/venv2", "~@work", "a@root"]
)
def test_other_paths_are_not(text):
    """Longer names, and folders below another folder, are no paths of a machine."""
    assert not MACHINE_PATH.search(text.replace("@", "/"))


def test_untracked_files_are_left_alone():
    """A copy or helper that git does not track, wherever it lies, breaks no rule of the project."""
    own = ROOT / f"utils/untracked_{os.getpid()}.py"
    own.touch()
    try:
        found = list_sources()
    finally:
        own.unlink()
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("git tracks no files here")
    assert "utils/core/errors.py" in found and own.relative_to(ROOT).as_posix() not in found
