// Stars: what a text should find, kept by the server as rows that measure the index.

import * as api from "./api.js";
import { baseName, byId, counted, icon, make, say, span } from "./dom.js";

export function makeStars({ onError }) {
  let isOn = false;
  let command = "";
  let rows = new Map();

  const name = (text, place) => JSON.stringify([text, place.video_id, place.start_s, place.end_s]);

  async function load(keepsQueries) {
    isOn = keepsQueries;
    if (!isOn) return;
    const known = await api.starred();
    command = known.command;
    rows = new Map(known.queries.map((row) => [name(row.text, row), row]));
    for (const show of document.querySelectorAll(".star")) show.dispatchEvent(new Event("refresh"));
    tell();
  }

  // how many there are and what they are for; where none are kept, how to begin
  function tell() {
    byId("known-text").textContent = isOn
      ? `${rows.size ? counted(rows.size, "known query", "known queries") : "No known queries yet: star a hit that is right"}. They measure this index with`
      : "Stars on hits that are right would measure this index; this server keeps none. Its owner can start it with";
    byId("known-command").textContent = isOn ? command : "vlm serve INDEX --queries FILE.csv";
  }

  function button(hit, text) {
    if (!isOn) return null;
    const where = `${baseName(hit.path)}, ${span(hit)}`;
    const star = make("button", { type: "button", class: "tool round star", "aria-label": `This is right for “${text}”: ${where}` }, icon("star"));
    const show = () => {
      const isStarred = rows.has(name(text, hit));
      star.setAttribute("aria-pressed", String(isStarred));
      star.title = isStarred ? "A known query; press to forget it" : "This is right: keep it as a known query";
    };
    star.addEventListener("refresh", show);
    star.addEventListener("click", async () => {
      if (star.getAttribute("aria-disabled") === "true") return;
      star.setAttribute("aria-disabled", "true"); // not disabled, which would take the focus away
      try {
        const known = rows.get(name(text, hit));
        if (known) await forget(known);
        else rows.set(name(text, hit), await api.star(text, hit));
        say(known ? "Star taken away" : "Starred");
      } catch (error) {
        onError(error);
      } finally {
        star.removeAttribute("aria-disabled");
        show();
        tell();
      }
    });
    show();
    return star;
  }

  async function forget(row) {
    try {
      await api.unstar(row.key);
    } catch (error) {
      if (error.status !== 404) throw error; // somebody else was quicker
    }
    rows.delete(name(row.text, row));
  }

  return { load, tell, button };
}
