"""Play the middle of every video of a folder in Chromium, through the page, and look where it plays.

    python tests/soak/playback.py --videos DIR --out playback.json

Every file that can be decoded is indexed and opened from the page at the segment in its middle. The player
must come to stand in that segment, frames must advance, and the page must say where it does not play the file
itself. Run again with the same ``--out``, it goes on with the videos that it has not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "vlm-soak-playback/1"
_PATIENCE_S = 60.0
_TOLERANCE_S = 0.1


def main() -> int:
    """Play everything; 1 if anything was not played where it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    arguments = parser.parse_args()
    played: dict[str, Any] = {}
    if arguments.out.exists():
        played = json.loads(arguments.out.read_text(encoding="utf-8"))["played"]
    with tempfile.TemporaryDirectory(prefix="vlm-playback-") as scratch:
        index = Path(scratch) / "index"
        _vlm("index", "build", str(arguments.videos), "--out", str(index), "--model", "none")
        segments, rejected = _segments(index)
        waiting = {name: hit for name, hit in segments.items() if name not in played}
        for name, found in _play_all(index, waiting):
            played[name] = found
            print(f"{len(played)} of {len(segments)}: {name}: {found}", flush=True)
            _write(arguments.out, played, rejected)
    bad = [name for name, found in played.items() if not found["is_right"]]
    print(f"{len(played)} played, {len(bad)} not where they should: {', '.join(bad)}")
    return int(bool(bad))


def _vlm(*words: str) -> None:
    code = subprocess.run([sys.executable, "-m", "vlm", *words], check=False).returncode
    if code not in (0, 3):  # 3: some files were rejected, each with its reason
        raise SystemExit(f"vlm {' '.join(words)} ended with {code}")


def _segments(index: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the segment in the middle of each video, by file name, and the reasons of what was rejected."""
    from vlm.retrieval.index import VideoIndex

    opened = VideoIndex.open(index)
    snapshot, found = opened.snapshot, {}
    for position, video in enumerate(snapshot.videos):
        rows = np.flatnonzero(snapshot.row_video == position)
        start_s, end_s = snapshot.row_bounds[rows[len(rows) // 2]].tolist()
        name = Path(os.fsdecode(video.path)).name
        found[name] = {"video_id": video.video_id, "start_s": start_s, "end_s": end_s}
    return found, {Path(entry["path"]).name: entry["reason"] for entry in opened.info()["rejected"]}


def _play_all(index: Path, waiting: dict[str, dict[str, Any]]) -> Any:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "vlm", "serve", str(index), "--port", str(port)])
    try:
        _until(lambda: _answers(port))
        with sync_playwright() as playwright:
            flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
            browser = playwright.chromium.launch(executable_path=chromium, args=flags)
            for name, hit in waiting.items():
                yield name, _play(browser, address, name, hit)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def _play(browser: Any, address: str, name: str, hit: dict[str, Any]) -> dict[str, Any]:
    """Open the page, let its search find just this moment, play it; return what the player did."""
    page = browser.new_page()
    page.set_default_timeout(1000 * _PATIENCE_S)

    def only_this(route: Any) -> None:
        answer = route.fetch()
        body = answer.json()
        shown = {"rank": 1, "path": f"/{name}", "score": 1.0, "score_kind": "words", "warning": None}
        body["hits"] = [{**shown, "strength": None, "duplicates": [], **hit}]
        route.fulfill(response=answer, json=body)

    page.route("**/api/search", only_this)
    begun = time.monotonic()
    try:
        page.goto(f"{address}/?q=video")
        page.locator(f".card[data-video='{hit['video_id']}'] .open").click()
        script = "(() => { const v = document.querySelector('#video'); return [v.currentTime, v.paused]; })()"
        _until(lambda: (now := page.evaluate(script))[0] > 0 and not now[1])
        query = f"start_s={hit['start_s']}&end_s={hit['end_s']}"
        source = page.request.get(f"{address}/api/videos/{hit['video_id']}/playback?{query}").json()
        first = source["offset_s"] + page.evaluate(script)[0]
        taken_s = time.monotonic() - begun
        frames = "document.querySelector('#video').getVideoPlaybackQuality().totalVideoFrames"
        before = page.evaluate(frames)
        ended = "document.querySelector('#video').ended"
        advanced = _settles(lambda: page.evaluate(frames) > before or page.evaluate(ended))
        says = page.locator("#player-note").is_visible()
        within = hit["start_s"] - _TOLERANCE_S <= first <= hit["end_s"] + _TOLERANCE_S
        is_right = within and advanced and says == (source["how"] != "direct")
        facts = {"how": source["how"], "plays_at_s": round(first, 3), "first_frame_s": round(taken_s, 2)}
        return {**facts, "segment_s": [hit["start_s"], hit["end_s"]], "is_right": is_right}
    except Exception as error:
        state = page.locator("#screen-state").inner_text() if page.locator("#screen-state").count() else ""
        return {"is_right": False, "error": f"{type(error).__name__}: {error} {state}"[:300]}
    finally:
        page.close()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _settles(is_true: Any, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _until(is_true: Any) -> None:
    if not _settles(is_true, _PATIENCE_S):
        raise TimeoutError(f"not within {_PATIENCE_S:g} s")


def _write(path: Path, played: dict[str, Any], rejected: dict[str, str]) -> None:
    result = {
        "format": FORMAT,
        "num_played": len(played),
        "num_right": sum(found["is_right"] for found in played.values()),
        "how": dict(Counter(found.get("how", "failed") for found in played.values())),
        "rejected": rejected,
        "played": played,
    }
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
