import http.server
import json
import logging
import os
import re
import socket
import sys
import threading
from pathlib import Path

import pytest

from distllm.comm import World, gather
from distllm.config.errors import ConfigError
from distllm.config.schema import Config, TrackConfig
from distllm.track import wandb_run
from distllm.track.metrics import read_metrics
from distllm.track.tracker import Tracker
from distllm.track.wandb_run import STRUCK, scrub
from tests.ranks import on_ranks

OFF, ON = TrackConfig(wandb=False), TrackConfig(wandb=True)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no network, no netrc of the user who runs the tests."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def runs_in(folder: Path) -> list[str]:
    """The ids of the W&B runs in a run folder."""
    names = [path.name for path in folder.glob("wandb/*run-*") if path.is_dir()]
    return [re.sub(r"^(offline-)?run-\d+_\d+-", "", name).removesuffix("-1") for name in names]  # -1: in the same second


def test_the_metrics_file_is_written_without_wandb_which_is_not_even_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from distllm.config.schema import TrackConfig;"
        "from distllm.track.tracker import Tracker;"
        f"t = Tracker(Path({str(tmp_path)!r}), config=TrackConfig(), resolved={{}}, run_id='kept', is_main=True);"
        "t.log(1, {'loss': 2.0}); t.finish(); assert 'wandb' not in sys.modules; assert t.run_id == 'kept'"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", config=ON, resolved={}, run_id="abc", is_main=False)
    tracker.log(1, {"loss": 2.0})
    tracker.summary({"loss": 2.0})
    assert tracker.rewind(0) == 0
    tracker.finish()
    assert tracker.run_id == "abc"
    assert not (tmp_path / "run").exists()


def test_the_summary_is_a_file_and_later_values_replace_earlier_ones(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config=OFF, resolved={}, run_id=None, is_main=True)
    tracker.summary({"unigram_loss": 6.5, "val_loss": 3.0, "mfu": None})
    tracker.summary({"val_loss": float("nan"), "checkpoint": Path("step-3")})
    tracker.finish()
    tracker.finish()
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found == {"unigram_loss": 6.5, "val_loss": "nan", "checkpoint": "step-3"}


def test_one_offline_run_a_job_continued_under_its_id(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    resolved = Config(track=ON).model_dump(mode="json")
    first = Tracker(tmp_path, config=ON, resolved=resolved, run_id=None, is_main=True)
    first.log(1, {"loss": 2.0, "grad_norm": float("nan"), "mfu": None})
    first.log(2, {"loss": 1.0})
    first.finish()
    identity = first.run_id
    assert identity and runs_in(tmp_path) == [identity]
    second = Tracker(tmp_path, config=ON, resolved=resolved, run_id=identity, is_main=True)
    assert second.rewind(1) == 1
    second.log(2, {"loss": 1.0})
    second.log(1, {"late": 1.0})  # W&B would print a warning
    second.summary({"val_loss": 1.5})
    second.finish(code=75)
    assert second.run_id == identity and set(runs_in(tmp_path)) == {identity}
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 1]
    assert capfd.readouterr() == ("", "")


def test_many_ranks_make_one_run(tmp_path: Path) -> None:
    def job(world: World) -> str | None:
        tracker = Tracker(tmp_path / "run", config=ON, resolved={}, run_id=None, is_main=world.is_main)
        tracker.log(1, {"loss": 1.0})
        tracker.finish()
        gather(None, world)  # a rank that leaves while another still connects would break it
        return tracker.run_id

    main, *others = on_ranks(job, 3, tmp_path / "ranks")
    assert runs_in(tmp_path / "run") == [main] and others == [None, None]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


def test_no_secret_is_written_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ["arg-5ecret-1", "env-5ecret-2", "a" * 7 + "5ecret3" * 5, "config-5ecret-4", "pass-5ecret-5", "hf_" + "S" * 34]
    monkeypatch.setattr(sys, "argv", ["distllm", f"--api-key={secrets[0]}"])
    monkeypatch.setenv("SOME_TOKEN", secrets[1])
    monkeypatch.setenv("WANDB_API_KEY", secrets[2])
    resolved = {
        "model": {"spec_args": {"api_key": secrets[3]}, "path": f"https://me:{secrets[4]}@host/x"},
        "tags": ["fine", secrets[5]],
    }
    config = TrackConfig(wandb=True, tags=["fine", secrets[5]])
    tracker = Tracker(tmp_path, config=config, resolved=resolved, run_id=None, is_main=True)
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" and b"fine" in path.read_bytes() for path in files)  # finish waits for the writing
    for secret in secrets:
        assert not [path for path in files if secret.encode() in path.read_bytes()], secret


def test_scrub_strikes_secrets_and_leaves_the_rest() -> None:
    fine = {
        "tokenizer": {"kind": "bpe", "path": "me/tokenizer"},
        "sample_tokens": 64, "tokens": "x", "eos_token": "<eos>", "pad_token_id": 3, "num_key_value_heads": 4,
        "monkey": "banana", "keyboard": "qwerty", "keep": 2, "url": "https://host/path@1", "author": "me", "empty_key": "",
    }  # fmt: skip
    assert scrub(fine) == fine
    for key in ("key", "api_key", "apiKey", "HF_TOKEN", "hf-token", "secret", "client.secret", "password", "aws_credentials"):
        assert scrub({"a": [{key: "value"}]}) == {"a": [{key: STRUCK}]}, key
        assert scrub({key: ["one", "two"]}) == {key: [STRUCK, STRUCK]}, key
    assert scrub({"path": "s3://u:p@h/x"}) == {"path": f"s3://{STRUCK}@h/x"}
    assert scrub("see hf_" + "a" * 30) == f"see {STRUCK}"
    resolved = Config().model_dump(mode="json")
    assert scrub(resolved) == json.loads(json.dumps(resolved))


def test_a_missing_package_is_one_clear_line_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # old runs in the working folder look like a package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if getattr(f, "__name__", "") == "PathFinder"])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for is_main in (True, False):
        with pytest.raises(ConfigError, match=r"track\.wandb=true.*pip install 'distllm\[wandb\]'") as told:
            Tracker(tmp_path / "run", config=ON, resolved={}, run_id=None, is_main=is_main)
        assert "\n" not in str(told.value)


def test_without_a_key_or_a_network_the_run_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # discard: nobody listens
    assert wandb_run._mode() == ("offline", "no API key in WANDB_API_KEY or netrc")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1:9 login user password " + "k" * 40 + "\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_run._mode() == ("offline", "127.0.0.1 does not answer")
    monkeypatch.setattr(wandb_run, "_reachable", lambda url: True)
    assert wandb_run._mode() == ("online", "")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_run._mode()[0] == "disabled"


def test_a_server_that_refuses_leaves_one_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, modes, ids = wandb_run._start, [], []

    def start(folder: Path, **arguments: object) -> object:
        modes.append(arguments["mode"])
        ids.append(arguments["run_id"])
        if arguments["mode"] == "online":
            raise RuntimeError("401\nbad key https://me:pa55word@host/")
        return begin(folder, **arguments)

    monkeypatch.setattr(wandb_run, "_mode", lambda: ("online", ""))
    monkeypatch.setattr(wandb_run, "_start", start)
    lines: list[str] = []
    log = logging.Logger("test")
    log.addFilter(lambda record: lines.append(record.getMessage()) or False)
    tracker = Tracker(tmp_path, config=ON, resolved={}, run_id=None, is_main=True, log=log)
    tracker.finish()
    assert modes == ["online", "offline"] and ids == [tracker.run_id] * 2 and runs_in(tmp_path) == [tracker.run_id]
    (line,) = lines
    assert "offline (the server refused: 401 bad key" in line and "wandb sync" in line and "pa55word" not in line


def test_training_goes_on_when_wandb_fails(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config=ON, resolved={}, run_id=None, is_main=True)
    real = tracker._run._run

    class Broken:
        def log(self, values: object, step: int) -> None:
            raise ConnectionError("the service is gone")

    tracker._run._run = Broken()
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 1.0})
    tracker.finish()
    real.finish()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_disabled_wandb_keeps_the_id_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker(tmp_path, config=ON, resolved={}, run_id="abcd", is_main=True)
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    assert tracker.run_id == "abcd" and runs_in(tmp_path) == []


def test_a_server_that_never_answers_is_noticed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "REACH_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        port = server.getsockname()[1]
        assert not wandb_run._reachable(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("status", [200, 302, 404, 500])
def test_any_answer_is_an_answer(status: int) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert wandb_run._reachable(f"http://127.0.0.1:{server.server_port}")
        thread.join()


def test_what_was_logged_is_on_the_disk_when_finish_returns(tmp_path: Path) -> None:
    for i in range(5):
        tracker = Tracker(tmp_path / str(i), config=ON, resolved={}, run_id=None, is_main=True)
        tracker.log(1, {"distinctive": 1.0})
        tracker.finish()
        (data,) = (tmp_path / str(i)).glob("wandb/offline-run-*/*.wandb")
        assert b"distinctive" in data.read_bytes()
