// The player: starts at the matched second, marks the segment on the whole video's timeline.

import { playback, thumbnail, video as facts } from "./api.js";
import { baseName, byId, clock, make, span } from "./dom.js";

const NOTES = {
  remux: "Not every browser can play this file as it is, so this moment was copied into one that plays everywhere. Only the lit part of the timeline is here.",
  transcode: "Not every browser can play this file, so this moment was converted. Only the lit part of the timeline is here; the original is untouched.",
};

export function makePlayer({ onSimilar, onAsk }) {
  const dialog = byId("player");
  const screen = byId("video");
  const timeline = byId("timeline");
  const loop = byId("loop");
  let hit = null;
  let duration = 0;
  let offset = 0;
  let isWhole = true;
  let asking = new AbortController();

  const percent = (seconds) => `${Math.min(100, Math.max(0, (100 * seconds) / duration))}%`;
  const now = () => screen.currentTime + offset;

  function draw() {
    byId("head").style.left = percent(now());
    byId("time-now").textContent = clock(now(), 1);
    timeline.setAttribute("aria-valuenow", now().toFixed(1));
    timeline.setAttribute("aria-valuetext", `${clock(now())} of ${clock(duration)}`);
  }

  function lay(wholeDuration) {
    duration = Math.max(wholeDuration, hit.end_s, 0.01);
    const segment = byId("segment");
    segment.style.left = percent(hit.start_s);
    segment.style.width = percent(hit.end_s - hit.start_s);
    timeline.setAttribute("aria-valuemax", duration.toFixed(1));
    byId("time-end").textContent = clock(duration);
    byId("time-segment").textContent = `Moment ${span(hit)}`;
    draw();
  }

  function message(...content) {
    const area = byId("screen-state");
    area.replaceChildren(...content);
    area.hidden = content.length === 0;
  }

  function seek(seconds) {
    const from = offset;
    const to = isWhole ? duration : offset + (screen.duration || 0);
    screen.currentTime = Math.min(Math.max(seconds, from), Math.max(from, to - 0.05)) - offset;
    draw();
  }

  async function replay() {
    seek(hit.start_s);
    await screen.play().catch(() => {});
  }

  async function open(wanted) {
    asking.abort();
    asking = new AbortController();
    const { signal } = asking;
    hit = wanted;
    byId("player-title").textContent = baseName(hit.path);
    byId("player-facts").textContent = span(hit);
    byId("player-note").hidden = true;
    screen.removeAttribute("src");
    screen.poster = thumbnail(hit, 640);
    isWhole = true;
    offset = 0;
    lay(hit.end_s);
    message(make("div", { class: "spinner" }), make("p", {}, "Opening the video"));
    if (!dialog.open) dialog.showModal();
    try {
      const [about, source] = await Promise.all([facts(hit.video_id), playback(hit, signal)]);
      if (signal.aborted) return;
      isWhole = source.how === "direct";
      offset = source.offset_s;
      lay(about.duration_s);
      byId("part").style.left = isWhole ? "0%" : percent(offset);
      byId("part").style.width = isWhole ? "100%" : percent(hit.end_s - offset);
      byId("player-facts").textContent = `${about.width} × ${about.height}, ${clock(about.duration_s)}, ${about.codec}`;
      byId("player-note").textContent = NOTES[source.how] ?? "";
      byId("player-note").hidden = isWhole;
      screen.src = source.url;
    } catch (error) {
      if (error.name !== "AbortError") fail(error.message);
    }
  }

  function fail(text) {
    message(make("p", {}, "This moment cannot be shown."), make("p", {}, text));
  }

  screen.addEventListener("loadedmetadata", () => {
    message();
    replay();
  });
  screen.addEventListener("error", () => {
    if (screen.getAttribute("src")) fail("The browser gave up on the file.");
  });
  screen.addEventListener("timeupdate", () => {
    if (loop.getAttribute("aria-pressed") === "true" && now() >= hit.end_s) replay();
    draw();
  });
  screen.addEventListener("ended", () => {
    if (loop.getAttribute("aria-pressed") === "true") replay();
  });
  screen.addEventListener("seeking", draw);

  const pointed = (event) => {
    const box = timeline.getBoundingClientRect();
    seek((duration * (event.clientX - box.left)) / box.width);
  };
  timeline.addEventListener("pointerdown", (event) => {
    timeline.setPointerCapture(event.pointerId);
    pointed(event);
  });
  timeline.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) pointed(event);
  });
  timeline.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -5, ArrowUp: 5, PageDown: -10, PageUp: 10 };
    if (event.key in steps) seek(now() + steps[event.key]);
    else if (event.key === "Home") seek(0);
    else if (event.key === "End") seek(duration);
    else if (event.key === " ") { if (screen.paused) screen.play(); else screen.pause(); }
    else return;
    event.preventDefault();
  });

  byId("replay").addEventListener("click", replay);
  loop.addEventListener("click", () => {
    loop.setAttribute("aria-pressed", String(loop.getAttribute("aria-pressed") !== "true"));
  });
  byId("player-similar").addEventListener("click", () => { dialog.close(); onSimilar(hit); });
  byId("player-ask").addEventListener("click", () => { dialog.close(); onAsk(hit); });
  byId("player-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => {
    asking.abort();
    screen.pause();
    screen.removeAttribute("src");
    screen.load();
  });
  return { open };
}
