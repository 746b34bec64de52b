"""Upload a finished run's result, model card and previews to the Hub, as --push_to_hub does at the end of training.

    python -m utils.upload dreambooth-model --hub_model_id my-dog

Checkpoints, class images, logs and args.json stay here. Prints the repository's URL; exit status 1 and a message if it
failed, in which case nothing is lost and the same command tries again.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

from utils.core.errors import UserError
from utils.flags.command_line import say_without_tokens
from utils.hub import publish


def main(argv: list[str] | None = None) -> int:
    """Read the command line, upload, print the URL or what went wrong, and return the exit status."""
    args = parse_args(argv)
    try:
        if not publish.result_files(args.output_dir):
            raise UserError(
                f"{args.output_dir} holds no result (neither {publish.PIPELINE} nor {publish.ADAPTER}). Name the "
                "--output_dir of a run that has ended; a stopped one goes on with --resume_from_checkpoint latest."
            )
        saved = read_saved_args(args.output_dir)
        name = args.hub_model_id or saved.get("hub_model_id")
        private = saved.get("hub_private_repo", False) if args.hub_private_repo is None else args.hub_private_repo
        repository = publish.prepare_repository(name, args.output_dir, args.hub_token, private)
        print(publish.upload_result(args.output_dir, repository, args.hub_token))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    description = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m utils.upload", description=description, allow_abbrev=False)
    parser.error = functools.partial(say_without_tokens, parser.error)
    add = parser.add_argument
    add("output_dir", metavar="OUTPUT_DIR", type=Path, help="the run's --output_dir")
    add(
        "--hub_model_id",
        help="repository, 'name' or 'owner/name', created if need be; default: the run's own, or OUTPUT_DIR's name",
    )
    add(
        "--hub_token",
        help="access token with write role; others can read it in the process list: "
        "prefer `hf auth login` or HF_TOKEN, which are the default",
    )
    add(
        "--hub_private_repo",
        action=argparse.BooleanOptionalAction,
        help="create the repository as a private one and refuse a public one; default: as in the run",
    )
    return parser.parse_args(argv)


def read_saved_args(folder: Path) -> dict:
    """Read the flags of the run from its args.json; empty if there is none.

    Raises:
        UserError: The file cannot be read.
    """
    path = folder / "args.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Repair it or move it away.") from error


if __name__ == "__main__":
    sys.exit(main())
