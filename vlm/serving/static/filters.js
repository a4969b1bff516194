// The filters of the form, as an expression that the server understands.

import { byId } from "./dom.js";

const FIELDS = { name: "f-name", min: "f-min", max: "f-max", height: "f-height", strength: "f-strength" };

const quoted = (text) => `'${text.replaceAll("'", "''")}'`;
const number = (text) => (text !== "" && Number.isFinite(Number(text)) ? String(Number(text)) : null);

export function read() {
  return Object.fromEntries(Object.entries(FIELDS).map(([name, id]) => [name, byId(id).value.trim()]));
}

export function write(values) {
  for (const [name, id] of Object.entries(FIELDS)) byId(id).value = values[name] ?? "";
  refresh();
}

export function expression() {
  const { name, min, max, height } = read();
  const parts = [];
  if (name) parts.push(`path like ${quoted(`%${name}%`)}`);
  if (number(min)) parts.push(`duration_s > ${number(min)}`);
  if (number(max)) parts.push(`duration_s < ${number(max)}`);
  if (number(height)) parts.push(`height >= ${number(height)}`);
  return parts.length ? parts.join(" and ") : null;
}

export function refresh() {
  const count = Object.values(read()).filter((value) => value !== "").length + Number(byId("f-rerank").checked) + Number(byId("f-words").checked);
  byId("filter-count").textContent = count;
  byId("filter-count").hidden = count === 0;
}

export function toggle(isOpen = byId("filters").hidden) {
  byId("filters").hidden = !isOpen;
  byId("toggle-filters").setAttribute("aria-expanded", String(isOpen));
}

export function clear() {
  write({});
  byId("f-rerank").checked = false;
  byId("f-words").checked = false;
  refresh();
}
