// The page's state: one query at a time, in the address, so that going back works.

import * as api from "./api.js";
import { showAnswer } from "./answer.js";
import { card, skeletons } from "./cards.js";
import { baseName, byId, counted, icon, length, make, say, span } from "./dom.js";
import * as filters from "./filters.js";
import { makeIngest } from "./ingest.js";
import { makePlayer } from "./player.js";
import { makeStars } from "./stars.js";

const PAGE = 24;
const RERANKED = 50;
const EXAMPLES = {
  "digit-world": ["a red 3 moves left", "a blue 7 turns", "the green 1 flashes twice", "an orange 1 moves up"],
  open: ["someone rides a bicycle", "a dog runs", "cooking in a pan", "waves on a beach"],
};

let about = null;
let query = { mode: "search", text: "", choices: "", videoId: null, file: null, like: null, unlike: [] };
let pending = new AbortController();
let shown = { next: null, id: null, hits: [], best: 1, worst: 0 };

const player = makePlayer({ onSimilar: findSimilar, onAsk: askAbout });
const ingest = makeIngest({ onChange: () => loadInfo().catch(() => {}) });
const handlers = { onOpen: (hit) => player.open(hit), onSimilar: findSimilar };
const rejecting = { ...handlers, onUnlike: reject };
const stars = makeStars({ onError: (error) => note([], [error.message]) });

async function loadInfo() {
  about = await api.info();
  const rejected = about.num_rejected ? ` · ${about.num_rejected.toLocaleString("en")} rejected` : "";
  byId("stats").textContent = `${counted(about.num_videos, "video")} · ${length(about.duration_s)}${rejected} · ${about.model_name}`;
  await stars.load(about.keeps_queries).catch((error) => note([], [error.message]));
  byId("open-ingest").hidden = about.ingest_folders.length === 0;
  byId("player-ask").hidden = !about.capabilities.includes("choose");
  byId("rerank-area").hidden = !about.capabilities.includes("rerank");
  byId("words-area").hidden = about.is_store;
  const examples = about.num_videos ? EXAMPLES[about.model_domain] ?? EXAMPLES.open : [];
  byId("examples").replaceChildren(
    ...examples.map((text) => make("button", { type: "button", onclick: () => { byId("text").value = text; submit(); } }, text)),
  );
  byId("examples").hidden = examples.length === 0 || query.mode === "ask";
  const domain = byId("domain");
  domain.hidden = about.model_domain === "open";
  domain.replaceChildren(
    icon("warn"),
    make("span", {}, `Demonstration model: it knows only the ${about.model_domain.replace("-", " ")}. On any other video its results are random.`),
  );
  if (!about.num_videos && !isAsked()) {
    const hint = about.ingest_folders.length ? "Add some with the button above." : "Add some with: vlm index add INDEX FOLDER";
    state("film", "No videos yet", `This index is empty. ${hint}`);
  } else if (!isAsked()) {
    byId("state").hidden = true;
  }
}

const isAsked = () => Boolean(query.text || query.file || query.like);

function state(symbol, title, text, { bad = false, action = null } = {}) {
  const area = byId("state");
  area.className = bad ? "state bad" : "state";
  area.replaceChildren(icon(symbol), make("h3", {}, title), make("p", {}, text));
  if (action) area.append(make("button", { type: "button", class: "secondary", onclick: action.run }, action.label));
  area.hidden = false;
}

function showQuery() {
  const isAsk = query.mode === "ask";
  byId("mode-search").setAttribute("aria-pressed", String(!isAsk));
  byId("mode-ask").setAttribute("aria-pressed", String(isAsk));
  byId("choices-area").hidden = !isAsk;
  byId("choices").value = query.choices;
  byId("under").hidden = isAsk;
  byId("pick").hidden = isAsk;
  if (isAsk) filters.toggle(false);
  byId("examples").hidden = isAsk || !byId("examples").children.length;
  byId("submit").textContent = isAsk ? "Ask" : "Search";
  const input = byId("text");
  input.value = query.text;
  input.placeholder = isAsk ? "What would you like to know?" : "What happens in the video?";
  byId("text-label").textContent = isAsk ? "Question" : "What happens in the video";
  const chip = query.file ? `${query.file.name}` : query.like ? `Like ${baseName(query.like.path)}` : query.videoId ? "In one video" : "";
  byId("chip").hidden = !chip;
  byId("chip-text").textContent = chip;
  showChipImage();
}

function showChipImage() {
  const image = byId("chip-image");
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  image.hidden = true;
  if (query.like) image.src = api.thumbnail(query.like);
  else if (query.file && api.kindOf(query.file) === "image") image.src = URL.createObjectURL(query.file);
  else return;
  image.hidden = false;
}

function remember(push) {
  const words = new URLSearchParams();
  if (query.text) words.set("q", query.text);
  if (query.mode === "ask") words.set("mode", "ask");
  if (query.choices && query.mode === "ask") words.set("choices", query.choices);
  if (query.videoId) words.set("video", query.videoId);
  if (query.like) words.set("like", JSON.stringify([query.like.video_id, query.like.start_s, query.like.end_s, baseName(query.like.path)]));
  for (const [name, value] of Object.entries(filters.read())) if (value) words.set(name, value);
  const address = words.size ? `/?${words}` : "/";
  if (push && address !== location.pathname + location.search) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
  document.title = query.text ? `${query.text} – video search` : "Video search";
}

function recall() {
  const words = new URLSearchParams(location.search);
  query = { mode: words.get("mode") === "ask" ? "ask" : "search", text: words.get("q") ?? "", choices: words.get("choices") ?? "", videoId: words.get("video"), file: null, like: null, unlike: [] };
  try {
    const [video_id, start_s, end_s, path] = JSON.parse(words.get("like") ?? "null");
    query.like = { video_id: String(video_id), start_s: Number(start_s), end_s: Number(end_s), path: String(path) };
  } catch { /* no such wish, or not one of ours */ }
  filters.write(Object.fromEntries(words));
  run(false);
}

function submit() {
  const text = byId("text").value.trim();
  if (text) Object.assign(query, { text, file: null, like: null });
  else query.text = "";
  query.unlike = [];
  query.choices = byId("choices").value;
  if (matchMedia("(pointer: coarse)").matches) byId("text").blur(); // the keyboard on the screen would hide the results
  run(true);
}

async function run(push) {
  pending.abort();
  pending = new AbortController();
  const { signal } = pending;
  for (const id of ["note", "answer", "state", "more", "known"]) byId(id).hidden = true;
  byId("summary").textContent = "";
  byId("details").textContent = "";
  byId("grid").replaceChildren();
  const { id } = shown;
  shown = { next: null, id: query.unlike.length ? id : null, hits: [], best: 1, worst: 0 };
  document.body.dataset.view = isAsked() ? "results" : "home";
  showQuery();
  remember(push);
  if (!isAsked()) {
    await loadInfo().catch(showError);
    return;
  }
  byId("results").setAttribute("aria-busy", "true");
  byId("grid").replaceChildren(...skeletons(query.mode === "ask" ? 0 : 8));
  if (query.mode === "ask") state("ask", "Looking", "Searching for the moment that answers this.");
  const started = performance.now();
  try {
    if (query.mode === "ask") await runAsk(signal);
    else showPage(await fetchPage(0, signal), started, true);
  } catch (error) {
    if (error.name === "AbortError") return;
    showError(error);
  } finally {
    if (!signal.aborted) byId("results").removeAttribute("aria-busy");
  }
}

function fetchPage(offset, signal) {
  const common = { top_k: PAGE, where: filters.expression() };
  if (query.unlike.length && !query.text) {
    const others = query.like && `video_id != '${query.like.video_id.replaceAll("'", "''")}'`;
    const where = [others, common.where && `(${common.where})`].filter(Boolean).join(" and ") || null;
    return api.search({ ...common, where, offset, unlike: query.unlike, query_id: shown.id }, signal);
  }
  if (query.like) return api.similar({ ...common, offset, video_id: query.like.video_id, start_s: query.like.start_s }, signal);
  if (query.file) return offset ? api.search({ ...common, offset, query_id: shown.id }, signal) : api.upload(query.file, common, signal);
  const rerank = byId("f-rerank").checked && about?.capabilities.includes("rerank") ? RERANKED : 0;
  const min_strength = filters.read().strength || null;
  return api.search({ ...common, offset, rerank, min_strength, unlike: query.unlike, words: byId("f-words").checked && !about?.is_store, text: query.text }, signal);
}

async function runAsk(signal) {
  const choices = query.choices.split("\n").map((line) => line.trim()).filter(Boolean);
  if (choices.length === 1) throw new api.ApiError(400, "invalid_input", "Give two or more possible answers, or none.");
  const reply = await api.ask({ question: query.text, choices: choices.length ? choices : null, video_id: query.videoId }, signal);
  byId("state").hidden = true;
  byId("summary").textContent = query.text;
  showAnswer(reply, handlers);
  note(reply.unknown_words, []);
}

function showPage(page, started, isFirst) {
  const grid = byId("grid");
  if (isFirst) grid.replaceChildren();
  const { hits } = page;
  if (isFirst && hits.length) {
    const scores = hits.filter((hit) => hit.score_kind === hits[0].score_kind).map((hit) => hit.score);
    shown.best = Math.max(...scores);
    shown.worst = Math.min(...scores, shown.best - Math.abs(shown.best || 1));
  }
  const first = grid.children.length;
  // a meter compares only what is comparable: scores of the first hit's kind
  const meter = (hit) => (hit.score_kind === (shown.hits[0] ?? hits[0]).score_kind ? 0.06 + 0.94 * Math.max(0, (hit.score - shown.worst) / (shown.best - shown.worst || 1)) : null);
  // a star says that a hit is right for a text
  const isText = Boolean(query.text);
  const star = isText ? (hit) => stars.button(hit, query.text) : null;
  const cards = hits.map((hit) => card(hit, meter(hit), { ...rejecting, star }));
  byId("known").hidden = !isText || (isFirst && !hits.length);
  stars.tell();
  shown.hits.push(...hits);
  grid.append(...cards);
  Object.assign(shown, { next: page.next_offset, id: page.query_id });
  byId("more").hidden = page.next_offset == null;
  if (!isFirst) {
    grid.children[first]?.querySelector(".open").focus();
    say(`${counted(hits.length, "more moment")}`);
    return;
  }
  const seconds = ((performance.now() - started) / 1000).toFixed(2);
  byId("summary").textContent = query.like ? `Moments like ${baseName(query.like.path)}, ${span(query.like)}` : query.file ? `Moments like ${query.file.name}` : query.text;
  byId("details").textContent = hits.length ? `Best ${counted(hits.length, "moment")}, one a video · ${seconds} s` : "";
  note(page.unknown_words, page.notes);
  if (!hits.length) {
    const isFiltered = filters.expression() !== null || filters.read().strength !== "";
    const action = isFiltered ? { label: "Clear filters", run: () => { filters.clear(); run(true); } } : null;
    const isGraded = Boolean(query.text && filters.read().strength);
    const text = isGraded ? "No moment fits these words better than unrelated texts fit." : isFiltered ? "No video passes these filters." : "This index holds no other videos to choose from.";
    state("film", isGraded ? "Nothing found" : "Nothing to show", text, { action });
  }
  say(hits.length ? `${counted(hits.length, "moment")} found` : "Nothing found");
}

function note(unknownWords, notes) {
  const lines = [...notes];
  if (unknownWords.length) lines.unshift(`The model does not know: ${unknownWords.join(", ")}`);
  byId("note").textContent = lines.join(" ");
  byId("note").hidden = lines.length === 0;
}

function showError(error) {
  byId("grid").replaceChildren();
  if (error.code === "query_gone" && query.file) { query.unlike = []; run(false); return; }
  const sentence = error.message.charAt(0).toUpperCase() + error.message.slice(1);
  const title = error.status === 0 ? "No connection" : error.status === 503 ? "The server is busy" : error.status >= 500 ? "The server failed" : "This did not work";
  state("warn", title, sentence, { bad: true, action: { label: "Try again", run: () => run(false) } });
  say(`${title}. ${sentence}`);
}

async function showMore() {
  const button = byId("more");
  button.disabled = true;
  try {
    showPage(await fetchPage(shown.next, pending.signal), 0, false);
  } catch (error) {
    if (error.name !== "AbortError") { byId("note").textContent = error.message; byId("note").hidden = false; }
  } finally {
    button.disabled = false;
  }
}

function findSimilar(hit) {
  query = { ...query, mode: "search", text: "", file: null, videoId: null, like: hit, unlike: [] };
  run(true);
  scrollTo({ top: 0 });
  byId("results").focus({ preventScroll: true });
}

function reject(hit) {
  const most = 16;
  query.unlike = [...query.unlike, { video_id: hit.video_id, start_s: hit.start_s }].slice(-most);
  run(false);
  say(`${baseName(hit.path)} is left out`);
  byId("results").focus({ preventScroll: true });
}

function askAbout(hit) {
  query = { ...query, mode: "ask", text: "", file: null, like: null, videoId: hit.video_id };
  run(true);
  byId("text").focus();
}

function useFile(file) {
  if (!file) return;
  const kind = api.kindOf(file);
  query = { ...query, mode: "search", text: "", like: null, videoId: null, file, unlike: [] };
  const most = about?.limits[kind === "image" ? "max_image_bytes" : "max_video_bytes"] ?? Infinity;
  if (file.size > most) {
    showQuery();
    showError(new api.ApiError(413, "too_large", `This file has ${Math.ceil(file.size / 2 ** 20)} MiB, at most ${most / 2 ** 20} MiB are taken.`));
    return;
  }
  run(true);
}

function setMode(mode) {
  query = { ...query, mode, text: byId("text").value.trim() };
  if (mode === "ask") Object.assign(query, { file: null, like: null });
  else query.videoId = null;
  showQuery();
  byId("text").focus();
}

function setTheme(theme) {
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  byId("theme").setAttribute("aria-label", `Theme: ${theme === "auto" ? "automatic" : theme}`);
  byId("theme").title = byId("theme").getAttribute("aria-label");
  localStorage.setItem("theme", theme);
}

function listen() {
  byId("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  byId("more").addEventListener("click", showMore);
  byId("mode-search").addEventListener("click", () => setMode("search"));
  byId("mode-ask").addEventListener("click", () => setMode("ask"));
  byId("toggle-filters").addEventListener("click", () => filters.toggle());
  byId("filters").addEventListener("input", filters.refresh);
  byId("filters").addEventListener("change", () => { if (isAsked()) run(true); });
  byId("clear-filters").addEventListener("click", () => { filters.clear(); if (isAsked()) run(true); });
  byId("chip-close").addEventListener("click", () => { Object.assign(query, { file: null, like: null, videoId: null, unlike: [] }); run(true); byId("text").focus(); });
  byId("pick").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => { useFile(byId("file").files[0]); byId("file").value = ""; });
  byId("theme").addEventListener("click", () => {
    const order = ["auto", "light", "dark"];
    setTheme(order[(order.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3]);
  });
  addEventListener("popstate", recall);
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.closest("input, textarea, dialog")) { event.preventDefault(); byId("text").focus(); }
  });
  listenForDrops();
}

function listenForDrops() {
  const drop = byId("drop");
  const carries = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => { if (carries(event)) drop.hidden = false; });
  addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
  drop.addEventListener("dragleave", (event) => { if (event.target === drop || !event.relatedTarget) drop.hidden = true; });
  addEventListener("drop", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    drop.hidden = true;
    useFile(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => { const [file] = event.clipboardData?.files ?? []; if (file) useFile(file); });
}

api.askForToken(() => new Promise((resolve) => {
  const dialog = byId("login");
  if (dialog.open) { dialog.addEventListener("close", resolve, { once: true }); return; }
  dialog.showModal();
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  byId("login-form").onsubmit = async (event) => {
    event.preventDefault();
    try {
      await api.login(byId("token").value.trim());
      byId("token").value = "";
      dialog.close();
      resolve();
    } catch (error) {
      byId("login-error").textContent = error.status === 401 ? "This is not the token." : error.message;
    }
  };
}));

setTheme(localStorage.getItem("theme") ?? "auto");
listen();
try {
  await loadInfo();
  recall();
  if (about.ingest_folders.length) ingest.look();
} catch (error) {
  showError(error);
}
