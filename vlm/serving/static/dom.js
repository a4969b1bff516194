// Small tools for building the page. Text is only ever set as text, never as markup.

export const byId = (id) => document.getElementById(id);

export function make(name, values = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(values)) {
    if (key === "class") element.className = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function clock(seconds, digits = 0) {
  const whole = Math.max(0, digits ? Math.round(seconds * 10) / 10 : Math.floor(seconds + 1e-6));
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor((whole % 3600) / 60);
  const rest = (whole % 60).toFixed(digits).padStart(digits ? 4 : 2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

export function span(hit) {
  const digits = hit.end_s - hit.start_s < 2 ? 1 : 0;
  const end = digits ? hit.end_s : Math.max(Math.round(hit.end_s), Math.floor(hit.start_s) + 1);
  return `${clock(hit.start_s, digits)}–${clock(end, digits)}`;
}

export function length(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export const baseName = (path) => path.split(/[\\/]/).pop();

export const counted = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

export function say(text) {
  const live = byId("live");
  live.textContent = "";
  // a region that is emptied and filled at once is not read out again by every reader
  setTimeout(() => { live.textContent = text; }, 60);
}

export const isCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
