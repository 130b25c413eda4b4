"""hub.py: the commits of repositories, asked once and pinned, and what is said of a Hub out of reach."""

import datasets
import huggingface_hub
import pytest
from data_help import COMMIT, LATER

from classifier.data.cache import download, hub_commit, note_loaded, was_loaded
from classifier.messages import BadInput

pytestmark = pytest.mark.usefixtures("empty_cache")


def test_the_commit_is_asked_for_once(hub, empty_cache):
    assert hub_commit("org/model", "model") == COMMIT
    (pin,) = empty_cache.iterdir()
    assert pin.read_text() == COMMIT and pin.name == "models--org--model--main.commit"
    hub.commit = LATER
    assert hub_commit("org/model", "model") == COMMIT
    assert hub.asked == [("commit", "org/model", "model", None)]
    assert hub_commit("org/model", "model", refresh=True) == LATER
    assert hub_commit("org/model", "model") == LATER
    assert len(hub.asked) == 2


def test_a_commit_needs_no_asking(hub):
    assert hub_commit("org/model", "model", LATER, refresh=True) == LATER and hub.asked == []


def test_each_repository_kind_and_revision_has_a_commit_of_its_own(hub):
    questions = [("a/b", "model"), ("a/b", "dataset"), ("a/c", "model"), ("a/b", "model", "v1"), ("b", "model")]
    questions.append(("a/b", "dataset", "refs/convert/parquet"))
    expected = {}
    for number, question in enumerate(questions):
        hub.commit = expected[question] = str(number) * 40
        assert hub_commit(*question) == hub.commit
    assert {question: hub_commit(*question) for question in questions} == expected
    assert len(hub.asked) == len(questions)


def test_a_model_was_loaded_where_that_is_noted_and_its_files_are_still_there(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert not was_loaded("org/model", COMMIT)  # a download may have broken off
    note_loaded("org/model", COMMIT)
    assert was_loaded("org/model", COMMIT)
    assert not was_loaded("org/model", LATER) and not was_loaded("org/other", COMMIT)
    snapshot.rmdir()
    assert not was_loaded("org/model", COMMIT)


def fail_with(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)


def refusal(function, *arguments, **options):
    with pytest.raises(BadInput) as caught:
        function(*arguments, **options)
    assert "\n" not in caught.value.reason and "\n" not in caught.value.advice
    return caught.value


HTTP_ERROR = huggingface_hub.errors.HTTPError  # of requests, httpx or httpx2, by version
NETWORK_ERRORS = {
    "offline": huggingface_hub.errors.OfflineModeIsEnabled("offline mode"),
    "refused": HTTP_ERROR("[Errno 111]\nConnection refused"),
    "timed out": TimeoutError("timed out"),
}
# What HfApi raises without a network: in offline mode, and from the HTTP library underneath.
network_errors = pytest.mark.parametrize("error", NETWORK_ERRORS.values(), ids=NETWORK_ERRORS)


@network_errors
@pytest.mark.parametrize("call", [(hub_commit, "org/name", "model"), (download, "org/name", None, COMMIT)])
def test_an_unreachable_hub(monkeypatch, error, call):
    fail_with(monkeypatch, error)
    refused = refusal(*call)
    assert "cannot download org/name" in refused.reason and str(error).split("\n")[-1] in refused.reason
    assert all(word in refused.advice for word in ("HF_ENDPOINT", "--task demo", "--train_file"))


def test_offline_mode_as_it_is():
    """Without a stand-in: the tests run with HF_HUB_OFFLINE=1."""
    assert "HF_ENDPOINT" in refusal(hub_commit, "org/model", "model").advice


@network_errors
@pytest.mark.parametrize(("kind", "revision", "reference"), [("model", None, "main"), ("dataset", "v1", "v1")])
def test_what_another_tool_downloaded_serves_without_a_network(tmp_path, monkeypatch, kind, revision, reference, error):
    fail_with(monkeypatch, error)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    file = tmp_path / "hub" / f"{kind}s--org--name" / "refs" / reference
    file.parent.mkdir(parents=True)
    file.write_text(LATER + "\n")
    assert hub_commit("org/name", kind, revision) == LATER
    file.unlink()
    assert hub_commit("org/name", kind, revision) == LATER  # pinned


@pytest.mark.parametrize("error", ["RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError"])
@pytest.mark.parametrize(("kind", "words"), [("model", "give a folder"), ("dataset", "give a file")])
def test_a_repository_or_revision_that_is_not_there(monkeypatch, kind, words, error):
    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    fail_with(monkeypatch, getattr(huggingface_hub.errors, error)("404", response=response))
    refused = refusal(hub_commit, "org/nmae", kind, "v9")
    assert f'no {kind} "org/nmae" at v9' in refused.reason and words in refused.advice


def test_a_mistyped_folder_is_no_repository():
    """A path of several parts cannot be a repository: huggingface_hub says so before it asks."""
    refused = refusal(hub_commit, "runs/mprc/model", "model")
    assert 'no model "runs/mprc/model"' in refused.reason and "give a folder" in refused.advice


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'some/data' doesn't exist"), "doesn't exist"),
        (ValueError("BuilderConfig 'part' not found.\nAvailable: ['cola', 'mrpc']"), "Available: ['cola', 'mrpc']"),
        (datasets.exceptions.DatasetGenerationError("a damaged file"), "a damaged file"),
        (FileNotFoundError("no data files"), "no data files"),
    ],
    ids=["no such data", "no such part", "damaged", "no files"],
)
def test_a_download_that_fails(monkeypatch, error, words):
    fail_with(monkeypatch, error)
    refused = refusal(download, "some/data", "part", COMMIT)
    assert refused.reason.startswith("some/data (part): ") and words in refused.reason
    assert "dataset: {path, name}" in refused.advice
