// The server's own folders: begin to index one, watch how it goes.

import * as api from "./api.js";
import { byId, counted, make, say } from "./dom.js";

const LABELS = { running: "Running", done: "Done", failed: "Failed", cancelled: "Stopped" };
const LOOK_MS = 700;

export function makeIngest({ onChange }) {
  const dialog = byId("ingest");
  let timer = 0;
  let running = null;

  async function look() {
    clearTimeout(timer);
    let state;
    try {
      state = await api.ingest();
    } catch (error) {
      byId("jobs").replaceChildren(make("li", { class: "error" }, error.message));
      return;
    }
    const current = state.jobs.find((job) => job.state === "running");
    show(state, Boolean(current));
    if (running && running !== current?.id) {
      const over = state.jobs.find((job) => job.id === running);
      if (over) say(`Indexing ${over.folder}: ${LABELS[over.state]}`);
      onChange();
    }
    running = current?.id ?? null;
    if (current) {
      onChange();
      timer = setTimeout(look, LOOK_MS);
    }
  }

  function show(state, isBusy) {
    byId("folders").replaceChildren(
      ...state.folders.map((folder) =>
        make(
          "li",
          {},
          make("span", {}, folder),
          make("button", { type: "button", class: "secondary", disabled: isBusy, "aria-label": `Index ${folder}`, onclick: () => begin(folder) }, "Index"),
        ),
      ),
    );
    const rows = state.jobs.slice(0, 8).map(row);
    byId("jobs").replaceChildren(...(rows.length ? rows : [make("li", { class: "hint" }, "None yet.")]));
  }

  function row(job) {
    const item = make("li", {}, make("div", { class: "top" }, make("strong", {}, job.folder), make("span", {}, LABELS[job.state])));
    if (job.state === "running") {
      const known = job.total != null && job.total > 0;
      const bar = make("progress", { "aria-label": `Indexing ${job.folder}`, max: known ? job.total : null, value: known ? job.done : null });
      const text = known ? `${job.done} of ${counted(job.total, "video")}` : job.stage;
      item.append(bar, make("p", { class: "hint" }, text));
      item.append(make("button", { type: "button", class: "quiet", onclick: () => stop(job.id) }, "Stop"));
    } else if (job.report) {
      const { num_added: added, num_updated: updated, num_unchanged: same, rejected } = job.report;
      item.append(make("p", { class: "hint" }, `${added} added, ${updated} updated, ${same} unchanged, ${rejected.length} rejected`));
      for (const bad of rejected.slice(0, 5)) item.append(make("p", { class: "hint" }, `${bad.path}: ${bad.reason}`));
    } else if (job.message) {
      item.append(make("p", { class: "hint" }, job.message));
    }
    return item;
  }

  async function begin(folder) {
    try {
      running = (await api.startIngest(folder)).id;
      say(`Indexing ${folder} has begun`);
    } catch (error) {
      say(error.message);
    }
    await look();
  }

  async function stop(id) {
    await api.cancelIngest(id).catch((error) => say(error.message));
    await look();
  }

  byId("open-ingest").addEventListener("click", () => { dialog.showModal(); look(); });
  byId("ingest-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  return { look };
}
