"""The Hub: data sets and models at the commit that was downloaded first; --refresh asks for a newer one."""

import re
from pathlib import Path

from cache import cache_folder, write_text
from reader import BadInput


def download(path, name, commit):
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        return load_dataset(path, name, revision=commit)
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        words = f"{path}{f' ({name})' if name else ''}: {' '.join(str(error).split())[:300]}"
        raise BadInput(words, "Check `dataset: {path, name}` of the task.") from None
    except (OSError, HTTPError) as error:  # ConnectionError is an OSError
        raise unreachable_hub(path, error) from None


def hub_commit(repository, kind, revision=None, refresh=False):
    """Return the commit of a Hub repository: the one it had when it was first used here; `refresh` asks the Hub again.

    kind is "model" or "dataset"; a revision that is a commit needs no asking.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    pin = cache_folder() / f"{kind}s--{repository}--{revision or 'main'}.commit".replace("/", "--")
    if pin.exists() and not refresh:
        return pin.read_text()
    try:
        commit = HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=30).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):  # the first: or it is gated
        raise BadInput(
            f'the Hub has no {kind} "{repository}"{f" at {revision}" if revision else ""} that you may read',
            f"Check the name, log in with `hf auth login`, or give a {'folder' if kind == 'model' else 'file'}.",
        ) from None
    except (OSError, HTTPError) as error:  # HTTPError is of the library underneath: a refused connection, a time-out
        # Somebody may have downloaded it with another tool, for a cluster's compute nodes without a network.
        known = Path(constants.HF_HUB_CACHE, f"{kind}s--{repository.replace('/', '--')}", "refs", revision or "main")
        if not known.exists():
            raise unreachable_hub(repository, error) from None
        commit = known.read_text().strip()
    write_text(pin, commit)
    return commit


def was_loaded(repository, commit):
    """Return whether a model was loaded whole from the Hub before, at this commit, and is still in the cache."""
    from huggingface_hub import constants

    folder = f"models--{repository.replace('/', '--')}"
    return _mark(repository, commit).exists() and Path(constants.HF_HUB_CACHE, folder, "snapshots", commit).is_dir()


def note_loaded(repository, commit):
    """Note for was_loaded that all files of a model are in the cache: a download that broke off leaves a part."""
    write_text(_mark(repository, commit), commit)


def _mark(repository, commit):
    return cache_folder() / f"model--{repository.replace('/', '--')}--{commit}.loaded"


def unreachable_hub(repository, error):
    from huggingface_hub import constants

    words = " ".join(str(error).split())[:200]
    return BadInput(
        f"cannot download {repository} from {constants.ENDPOINT} ({words})",
        "Check the network or set HF_ENDPOINT to a mirror, give local files (--train_file, --model FOLDER), "
        "or try `--task demo`, which needs no network.",
    )
