// An answer: what was chosen, how sure, and the moment that shows it.

import { card } from "./cards.js";
import { byId, make, say, span } from "./dom.js";

export function showAnswer(reply, handlers) {
  const bars = reply.choices.map(({ text, score }) => {
    const bar = make("i");
    bar.style.width = `${Math.round(100 * Math.min(1, Math.max(0, score)))}%`;
    return make(
      "li",
      {},
      make("span", { class: "text" }, text),
      make("span", { class: "bar-track", "aria-hidden": "true" }, bar),
      make("span", { class: "value" }, score.toFixed(2)),
    );
  });
  const said = reply.answer == null
    ? [make("p", { class: "label" }, "No choices were given, and this model has no words of its own."), make("p", { class: "said" }, "Here is the moment that fits best.")]
    : [make("p", { class: "label" }, "Answer"), make("p", { class: "said" }, reply.answer), make("ul", { class: "bars" }, ...bars)];
  const evidence = make("ul", {}, card(reply.evidence, null, handlers));
  const area = byId("answer");
  area.replaceChildren(
    make("div", { class: "answer" }, make("div", {}, ...said), make("div", {}, make("p", { class: "label" }, "Seen here"), evidence)),
  );
  area.hidden = false;
  say(`${reply.answer ?? "No answer"}. Seen at ${span(reply.evidence)}.`);
}
