"""Looking into a run: a script's `main` in this process, and what its parts are given."""

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

BF16 = "--mixed_precision bf16"
PREVIEWS = "--validation_prompt dog --num_validation_images 1 --validation_num_inference_steps 1"


def forget_processes() -> None:
    """Let accelerate connect anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def watch(monkeypatch, owner, name: str, look) -> list:
    """Have a function's arguments looked at whenever it is called; return the list of what was seen."""
    seen, function = [], getattr(owner, name)

    def watched(*arguments, **options):
        seen.append(look(*arguments, **options))
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, watched)
    return seen


def planned(monkeypatch, here, script, flags: str = "", processes: int = 1):
    """Return the plan of a run with these flags, of which nothing else is done."""
    with monkeypatch.context() as patch:
        plans = []
        patch.setattr(script, "print_dry_run", lambda args, accelerator, plan: plans.append(plan) or 0)
        patch.setattr(Accelerator, "num_processes", processes)
        assert here(script, f"{flags} --dry_run") == 0
    return plans[0]


def as_process(monkeypatch, script, number: int) -> None:
    """Have a run take itself for the process of a number, once it has the batches of the only one."""
    watch(monkeypatch, script, "make_loader", lambda *given: monkeypatch.setattr(Accelerator, "process_index", number))
