"""The Hugging Face hub: ids, what not to download, and errors in words about the model that was asked for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from inranker_jax.errors import InputError

# Files of a model's folder that are never read: other frameworks' copies of the weights, and what a trainer keeps to go
# on from. As `fnmatch` has it, "*" stands for "/" too.
NOT_DOWNLOADED = (
    *("onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf", "tf_*", "rust_*"),
    *("checkpoint-*/*", "global_step*/*", "optimizer.pt"),
)
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@contextlib.contextmanager
def errors_told(hub_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns errors of `huggingface_hub` within the block into InputErrors.

    Args:
      hub_id: the model that was asked for, which is no folder here.
      revision: its revision, if one was asked for.

    Raises:
      InputError: the hub was not reached, or has no such model for this user.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{hub_id}: no folder of that name is here, it is not in the local Hugging Face cache, and the hub was not "
            "reached. Check the path; or go online (and unset HF_HUB_OFFLINE); or run "
            f"`hf download {hub_id} --local-dir FOLDER` elsewhere, copy the folder here, and give its path."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        where = f"{hub_id} at revision {revision}" if revision else hub_id
        raise InputError(
            f"{where}: no folder of that name is here and the Hugging Face hub did not give it ({error}). "
            "Check the spelling; log in with `hf auth login` if the model is private."
        ) from error
