// Requests to the server: one error type, one place that asks for the token, patience with a busy server.

export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    Object.assign(this, { status, code });
  }
}

let onLocked = () => Promise.reject(new ApiError(401, "token", "a token is needed"));
export const askForToken = (handler) => { onLocked = handler; };

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export async function call(address, { method = "GET", json, body, type, signal, headers = {} } = {}) {
  const options = { method, signal, headers: { ...headers }, credentials: "same-origin" };
  if (json !== undefined) {
    options.body = JSON.stringify(json);
    options.headers["Content-Type"] = "application/json";
  } else if (body !== undefined) {
    options.body = body;
    options.headers["Content-Type"] = type || "application/octet-stream";
  }
  for (let attempt = 0; ; attempt += 1) {
    let reply;
    try {
      reply = await fetch(address, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "offline", "The server does not answer. Is it still running?");
    }
    if (reply.ok) return reply.json();
    if (reply.status === 401 && !headers.Authorization) {
      await onLocked();
      continue;
    }
    if (reply.status === 503 && attempt < 3 && body === undefined) {
      await pause(400 * 2 ** attempt);
      continue;
    }
    const told = await reply.json().catch(() => ({}));
    const { code = "unexpected", message = `the server answered ${reply.status}` } = told.error ?? {};
    throw new ApiError(reply.status, code, message);
  }
}

export const info = () => call("/api/info");
export const search = (values, signal) => call("/api/search", { method: "POST", json: values, signal });
export const similar = (values, signal) => call("/api/similar", { method: "POST", json: values, signal });
export const ask = (values, signal) => call("/api/ask", { method: "POST", json: values, signal });
export const video = (id) => call(`/api/videos/${encodeURIComponent(id)}`);
export const ingest = () => call("/api/ingest");
export const startIngest = (folder) => call("/api/ingest", { method: "POST", json: { folder } });
export const cancelIngest = (id) => call(`/api/ingest/${encodeURIComponent(id)}`, { method: "DELETE" });
export const starred = () => call("/api/queries");
export const star = (text, { video_id, start_s, end_s }) =>
  call("/api/queries", { method: "POST", json: { text, video_id, start_s, end_s } });
export const unstar = (key) => call(`/api/queries/${encodeURIComponent(key)}`, { method: "DELETE" });
export const login = (token) =>
  call("/api/session", { method: "POST", headers: { Authorization: `Bearer ${token}` } });

export function upload(file, { where, top_k }, signal) {
  const words = new URLSearchParams({ top_k });
  if (where) words.set("where", where);
  const kind = kindOf(file);
  return call(`/api/search/${kind}?${words}`, { method: "POST", body: file, type: file.type, signal });
}

export const kindOf = (file) =>
  file.type.startsWith("image/") && file.type !== "image/gif" ? "image" : "video";

export function playback(hit, signal) {
  const words = new URLSearchParams({ start_s: hit.start_s, end_s: hit.end_s });
  return call(`/api/videos/${encodeURIComponent(hit.video_id)}/playback?${words}`, { signal });
}

export const thumbnail = (hit, width = 320) => {
  const middle = (hit.start_s + hit.end_s) / 2;
  return `/api/videos/${encodeURIComponent(hit.video_id)}/thumbnail?at_s=${middle.toFixed(1)}&width=${width}`;
};

export const filmstrip = (hit) =>
  `/api/videos/${encodeURIComponent(hit.video_id)}/filmstrip?start_s=${hit.start_s}&end_s=${hit.end_s}`;
