"""Indexing while serving: progress that moves, readers that see what is new, and jobs that end as asked."""

from __future__ import annotations

import threading
import time

import pytest


@pytest.fixture
def growing(serving, model, model_source, write_clip, tmp_path):
    """An index of one clip, served, with a folder of more."""
    from vlm.retrieval import VideoIndex

    write_clip(tmp_path / "first" / "a.mp4", [("red", 1)])
    for number in range(6):
        write_clip(tmp_path / "more" / f"{number}.mp4", [("blue", 1)])
    (tmp_path / "more" / "broken.mp4").write_bytes(b"not a video")
    index = VideoIndex.create(tmp_path / "index", model, source=model_source)
    index.add([tmp_path / "first"], model=model)
    with serving(tmp_path / "index", tmp_path / "cache", ingest_folders={"more": tmp_path / "more"}) as site:
        yield site


def wait(site, job_id: str, seconds: float = 60) -> list[dict]:
    """Return all that was seen of a job until it ended."""
    seen, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        job = site.get(f"/api/ingest/{job_id}").json
        if not seen or job != seen[-1]:
            seen.append(job)
        if job["state"] != "running":
            return seen
        time.sleep(0.01)
    raise AssertionError(f"still running: {seen[-1]}")


class Lines:
    """A process's output that has each line looked into once the server has taken it in."""

    def __init__(self, lines, look) -> None:
        self.lines, self.look = lines, look

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.lines.close()

    def __iter__(self):
        for line in self.lines:
            yield line
            self.look()


@pytest.fixture
def steps(growing, monkeypatch) -> list[dict]:
    """What the server says of the newest job after each event of its process."""
    said, jobs = [], growing.state.jobs
    spawn = jobs._spawn

    def watched(folder):
        process = spawn(folder)
        newest = lambda: growing.get("/api/ingest").json["jobs"][0]  # noqa: E731
        process.stdout = Lines(process.stdout, lambda: said.append(newest()))
        return process

    monkeypatch.setattr(jobs, "_spawn", watched)
    return said


def test_a_folder_is_indexed_while_searches_go_on(growing, steps) -> None:
    failures, counts, stop = [], [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            reply = growing.post("/api/search", {"text": "blue thing", "top_k": 50})
            if reply.status != 200:
                failures.append(reply.body)
            counts.append(len(reply.json["hits"]))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert growing.get("/api/ingest").json == {"folders": ["more"], "jobs": []}
        begun = growing.post("/api/ingest", {"folder": "more"})
        assert (begun.status, begun.json["state"]) == (202, "running")
        again = growing.post("/api/ingest", {"folder": "more"})
        assert (again.status, again.json["error"]["code"]) == (409, "running")
        seen = wait(growing, begun.json["id"])
        # what a job did is seen as soon as it is said to be over
        assert growing.get("/api/info").json["num_videos"] == 7
        counts.append(len(growing.post("/api/search", {"text": "blue thing", "top_k": 50}).json["hits"]))
    finally:
        stop.set()
        reader.join()
    last = seen[-1]
    assert last["state"] == "done", last
    assert last["report"]["num_added"] == 6
    assert last["report"]["rejected"] == [{"path": "broken.mp4", "reason": "not_a_video"}]
    done = [job["done"] for job in steps if job["total"] == 7]
    assert done == sorted(done) and set(done) >= set(range(1, 8)), done
    assert failures == [] and counts == sorted(counts) and counts[-1] == 7
    text = growing.get("/metrics").body.decode()
    assert 'ingest_items_total{result="added"} 6' in text
    assert 'ingest_items_total{result="rejected"} 1' in text


def test_a_job_can_be_stopped(growing) -> None:
    job = growing.post("/api/ingest", {"folder": "more"}).json
    stopped = growing.ask("DELETE", f"/api/ingest/{job['id']}")
    assert (stopped.status, stopped.json["state"]) == (200, "cancelled")
    growing.state.jobs._thread.join(30)
    assert growing.get(f"/api/ingest/{job['id']}").json["state"] == "cancelled"
    assert growing.get("/api/search").status == 405
    assert wait(growing, growing.post("/api/ingest", {"folder": "more"}).json["id"])[-1]["state"] == "done"


def test_a_killed_job_says_so(growing) -> None:
    job = growing.post("/api/ingest", {"folder": "more"}).json
    growing.state.jobs._process.kill()
    last = wait(growing, job["id"])[-1]
    assert last["state"] == "failed" and "died" in last["message"]
    assert growing.post("/api/search", {"text": "red"}).status == 200


def test_only_the_servers_folders_exist(growing, site) -> None:
    assert growing.post("/api/ingest", {"folder": "other"}).status == 404
    assert growing.get("/api/ingest/0000").status == 404
    assert growing.ask("DELETE", "/api/ingest/0000").status == 404
    assert site.get("/api/ingest").json == {"folders": [], "jobs": []}
