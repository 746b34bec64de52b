"""Sharing on the Hub: check before training that a repository can be written, list what is shared, and upload it.

Errors of requests are raised `from None`: trackers print the whole chain, and a careless answer repeats the token.
"""

import functools
import json
import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from utils.core.errors import UserError
from utils.hub.hub_requests import (
    BROKEN,
    FAILURES,
    find_token,
    reason_of,
    request_timeout,
    status_of,
    with_retries,
)

PIPELINE = "model_index.json"
ADAPTER = "pytorch_lora_weights.safetensors"
PRIVATE = {"class_images", "logs", "samples", "wandb"}  # folders of a run, whatever model_index.json says they are
PATIENCE = constants.HF_HUB_ETAG_TIMEOUT  # 10 s, unless the environment sets it
NEW_TOKEN = "Make a token with write role at https://huggingface.co/settings/tokens and log in: `hf auth login`"


@request_timeout(3 * PATIENCE)
def prepare_repository(name: str | None, output_dir: Path, token: str | None, private: bool) -> str:
    """Create the model repository unless it exists, and check that the login may write to it.

    Args:
        name: `owner/name`, or the `name` of one of the user's own; None takes the name of `output_dir`.
        output_dir: Where the run writes; need not exist yet.
        token: None takes the login of the environment or of `hf auth login`.
        private: Create it as a private one; a public one that exists is then refused.

    Returns:
        The full id, `owner/name`.

    Raises:
        UserError: There is no login, the Hub refuses it, the id or the rights, or does not answer.
    """
    token = _require_token(token)
    api = HfApi(token=token)
    user = _check_login(api)
    repository = name or output_dir.resolve().name
    if "/" not in repository:
        repository = f"{user}/{repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} cannot be a repository: {error} Set another --hub_model_id.") from None
    try:
        # None, not False: an organisation may have made private its default.
        with_retries(functools.partial(api.create_repo, repository, private=private or None, exist_ok=True))
        with_retries(functools.partial(api.auth_check, repository, write=True))
        is_exposed = private and not with_retries(functools.partial(api.model_info, repository)).private
    except FAILURES as error:
        reason = reason_of(error, token)
        if status_of(error) in (401, 402, 403, 404):
            advice = f"{NEW_TOKEN}, or set another --hub_model_id"
            raise UserError(f"{user} may not write to the repository {repository}: {reason}. {advice}.") from None
        raise UserError(f"the repository {repository} was not prepared: {reason}. {_detour(api)}") from None
    if is_exposed:
        raise UserError(
            f"--hub_private_repo is set, but the repository {repository} exists and is public. Make it private at "
            f"{api.endpoint}/{repository}/settings, set another --hub_model_id, or use --no-hub_private_repo."
        )
    return repository


def files_to_upload(folder: Path) -> list[str]:
    """List what may be shared of an output folder: card, previews and result, as sorted posix paths relative to it.

    Hidden files are left out, and so is everything behind a symlink: it may never have been meant to be shared. The
    pictures that stage II's previews enlarge may be photos, and stay here as well.
    """
    previews = [path for path in folder.glob("samples/**/*.png") if path.parent.name != "small"]
    candidates = [folder / "README.md", *previews, *result_files(folder)]
    return sorted({path.relative_to(folder).as_posix() for path in candidates if _may_be_shared(path, folder)})


def result_files(folder: Path) -> list[Path]:
    """List the files of the pipeline and of the adapter in an output folder; empty before training has ended.

    Raises:
        UserError: model_index.json cannot be read.
    """
    files, parts = [], set()
    if (folder / PIPELINE).is_file():
        files.append(folder / PIPELINE)
        # Components are named after parameters of the pipeline's class; "../elsewhere" or "checkpoint-500" are none.
        named = {name for name in _read_index(folder / PIPELINE) if name.isidentifier() and not name.startswith("_")}
        parts |= named - PRIVATE
    if (folder / ADAPTER).is_file():
        files.append(folder / ADAPTER)
        parts.add("scheduler")
    return files + [path for part in sorted(parts) for path in (folder / part).rglob("*") if path.is_file()]


@request_timeout(6 * PATIENCE)  # a commit of many files takes the Hub a while
def upload_result(folder: Path, repo_id: str, token: str | None) -> str:
    """Upload in one commit what `files_to_upload` lists, and return the repository's URL.

    Raises:
        UserError: It failed for whatever reason; the message has the command that tries again.
    """
    try:
        token = _require_token(token)
        api = HfApi(token=token)
        with_retries(functools.partial(_commit, api, folder, repo_id), BROKEN)
    except Exception as error:  # hf_xet's errors and those of upload threads have no base class in common
        way = say_how_to_upload(folder, repo_id)
        raise UserError(f"the upload to {repo_id} failed: {reason_of(error, token)}. {way}") from None
    return f"{api.endpoint}/{repo_id}"


def _commit(api: HfApi, folder: Path, repo_id: str) -> None:
    """Send what has not arrived yet, and commit it unless an earlier commit was done and only its answer was lost."""
    # Made anew for each try: an addition remembers what the Hub had before.
    additions = [CommitOperationAdd(name, folder.resolve() / name) for name in files_to_upload(folder)]
    # Not `upload_folder`: where xet is installed, that one makes several commits.
    api.create_commit(repo_id, additions, commit_message="Upload the result of DreamBooth training")


def say_how_to_upload(folder: Path, repo_id: str) -> str:
    """Say that a result is safe, and by which command it is uploaded later."""
    command = f"python -m utils.upload {shlex.quote(str(folder))} --hub_model_id {repo_id}"
    return f"The result is safe in {folder}. Try again with: {command}"


def _require_token(token: str | None) -> str:
    """Return the token of `find_token`, or raise an `UserError` if there is none."""
    if found := find_token(token):
        return found
    raise UserError(f"there is no login for the Hub. {NEW_TOKEN}, or set HF_TOKEN.")


def _check_login(api: HfApi) -> str:
    """Return the user's name, or raise an `UserError` if the Hub refuses the token or lets it only read."""
    try:
        account = with_retries(api.whoami)
        user, access = account["name"], account.get("auth", {}).get("accessToken", {})
    except FAILURES as error:
        reason = reason_of(error, api.token)
        if status_of(error) in (401, 403):
            raise UserError(f"the Hub refuses the token: {reason}. {NEW_TOKEN}.") from None
        raise UserError(f"the login cannot be checked: {reason}. {_detour(api)}") from None
    if access.get("role") == "read":
        raise UserError(f"the token of {user} can only read. {NEW_TOKEN}.")
    return user


def _detour(api: HfApi) -> str:
    """Say what to do when the Hub cannot be reached."""
    return (
        f"Check the connection to {api.endpoint} and that HF_HUB_OFFLINE is not set, or train without --push_to_hub "
        "and upload later with `python -m utils.upload OUTPUT_DIR`."
    )


def _read_index(path: Path) -> dict:
    """Read the names of a pipeline's components."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Save the pipeline again.") from error
    if not isinstance(index, dict):
        raise UserError(f"{path} holds no JSON object of components. Save the pipeline again.")
    return index


def _may_be_shared(path: Path, folder: Path) -> bool:
    """Tell whether a path is a file of the folder itself, not hidden and not reached through a symlink."""
    relative = path.relative_to(folder)
    is_hidden = any(part.startswith(".") for part in relative.parts)
    return path.is_file() and not is_hidden and path.resolve() == folder.resolve() / relative
