// One moment as a card: a still, a preview under the pointer, where it lies, and more like it.

import { filmstrip, thumbnail } from "./api.js";
import { baseName, icon, isCalm, make, span } from "./dom.js";

const CELLS = 8;
const LOOK_MS = 140;
const STEP_MS = 450;

const STRENGTHS = { strong: "strong", weak: "weak", unrelated: "no better than unrelated text" };

export function card(hit, meter, { onOpen, onSimilar, onUnlike, star }) {
  const name = baseName(hit.path);
  const shot = make("span", { class: "shot" });
  const open = make(
    "button",
    { type: "button", class: "open", onclick: () => onOpen(hit) },
    make("span", { class: "visually-hidden" }, "Play "),
    shot,
    make("span", { class: "name", title: hit.path }, name),
  );
  shot.append(still(hit), make("span", { class: "playing" }, icon("play")), make("span", { class: "badge" }, span(hit)));
  preview(open, shot, hit);
  const meta = make("span", { class: "meta" });
  if (meter != null) {
    const bar = make("i");
    bar.style.width = `${Math.round(100 * meter)}%`;
    const kinds = { "itm": "matching head", "itm+itc": "matching head and embedding" };
    const kind = kinds[hit.score_kind.split("@")[0]] ?? "embedding";
    meta.append(
      make("span", { class: "meter", "aria-hidden": "true" }, bar),
      make("span", { title: `Score by the ${kind} (${hit.score_kind})` }, hit.score.toFixed(3)),
    );
  }
  if (hit.strength) meta.append(make("span", { class: `strength ${hit.strength}`, title: "Compared with what unrelated texts find here" }, STRENGTHS[hit.strength]));
  if (hit.duplicates.length) meta.append(make("span", { title: hit.duplicates.map((copy) => `${copy.path}, ${span(copy)}`).join("\n") }, `also in ${hit.duplicates.length} more`));
  if (hit.warning) meta.append(make("span", { class: "doubt", title: hit.warning }, "not to be trusted"));
  open.append(meta);
  const item = make("li", { class: "card", "data-video": hit.video_id }, open);
  if (onSimilar) {
    const like = make(
      "button",
      { type: "button", class: "tool round like", title: "More like this", "aria-label": `More like ${name}, ${span(hit)}`, onclick: () => onSimilar(hit) },
      icon("similar"),
    );
    item.append(like);
  }
  const mark = star?.(hit);
  if (mark) item.append(mark);
  if (onUnlike) {
    const unlike = make(
      "button",
      { type: "button", class: "tool round unlike", title: "Not this one", "aria-label": `Not this one: ${name}, ${span(hit)}`, onclick: () => onUnlike(hit) },
      icon("close"),
    );
    item.append(unlike);
  }
  return item;
}

export function skeletons(count) {
  return Array.from({ length: count }, () =>
    make("li", { class: "card skeleton", "aria-hidden": "true" }, make("span", { class: "shot" }), make("div", { class: "line" })),
  );
}

function still(hit) {
  const image = make("img", { alt: "", loading: "lazy", decoding: "async", width: 320, height: 180 });
  let tries = 0;
  image.addEventListener("load", () => image.classList.add("ready"));
  image.addEventListener("error", () => {
    tries += 1;
    if (tries <= 2) {
      setTimeout(() => { image.src = `${thumbnail(hit)}&again=${tries}`; }, 900 * tries);
    } else {
      image.replaceWith(make("span", { class: "blank" }, icon("film")));
    }
  });
  image.src = thumbnail(hit);
  return image;
}

// A strip of frames, fetched once somebody looks; the pointer scrubs through it, the keyboard lets it run.
function preview(target, shot, hit) {
  const strip = make("span", { class: "strip", "aria-hidden": "true" });
  const progress = make("span", { class: "progress", "aria-hidden": "true" });
  let state = "absent";
  let timer = 0;
  let cell = 0;

  const show = (wanted) => {
    cell = Math.min(CELLS - 1, Math.max(0, wanted));
    strip.style.backgroundPosition = `${(100 * cell) / (CELLS - 1)}% 0`;
    strip.classList.add("on");
    progress.style.transform = `scaleX(${(cell + 1) / CELLS})`;
  };
  const load = () => {
    if (state !== "absent") return;
    state = "loading";
    const image = new Image();
    image.onload = () => {
      state = "ready";
      strip.style.backgroundImage = `url("${image.src}")`;
      shot.insertBefore(strip, shot.querySelector(".playing"));
      shot.append(progress);
      if (target.matches(":hover, :focus-visible")) show(cell);
    };
    image.onerror = () => { state = "absent"; };
    image.src = filmstrip(hit);
  };
  const leave = () => {
    clearTimeout(timer);
    clearInterval(timer);
    strip.classList.remove("on");
    progress.style.transform = "scaleX(0)";
  };

  target.addEventListener("pointerenter", (event) => {
    if (event.pointerType === "mouse") timer = setTimeout(load, LOOK_MS);
  });
  target.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "mouse") return;
    const box = shot.getBoundingClientRect();
    cell = Math.floor((CELLS * (event.clientX - box.left)) / box.width);
    if (state === "ready") show(cell);
  });
  target.addEventListener("pointerleave", leave);
  target.addEventListener("focus", () => {
    if (!target.matches(":focus-visible")) return;
    cell = 0;
    load();
    if (!isCalm()) timer = setInterval(() => { if (state === "ready") show((cell + 1) % CELLS); }, STEP_MS);
  });
  target.addEventListener("blur", leave);
}
