"""The interface described for programs (OpenAPI 3.1)."""

from __future__ import annotations

from typing import Any

from vlm import __version__
from vlm.retrieval.queries.values import MAX_PARTS
from vlm.serving.settings import Limits

Schema = dict[str, Any]


def document(limits: Limits, keeps_queries: bool = False) -> Schema:
    """Return the description of every address, its parameters, bodies and answers.

    Args:
        limits: What requests may cost.
        keeps_queries: Whether starred hits are kept.
    """
    paths = (
        _search_paths(limits),
        _video_paths(),
        _ingest_paths(),
        _query_paths(keeps_queries),
        _system_paths(),
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vlm",
            "version": __version__,
            "description": "Search an index of videos by what happens in them; times are seconds from a "
            "video's first frame.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "components": {
            "schemas": _schemas(limits),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
        "paths": {address: calls for part in paths for address, calls in part.items()},
    }


def _schemas(limits: Limits) -> Schema:
    numbers = {name: {"type": "number"} for name in ("start_s", "end_s", "own_start_s", "own_end_s")}
    duplicate: Schema = {"video_id": {"type": "string"}, "path": {"type": "string"}, **numbers}
    hit = {
        "rank": {"type": "integer", "minimum": 1},
        "video_id": {"type": "string"},
        "path": {"type": "string"},
        "start_s": {"type": "number"},
        "end_s": {"type": "number"},
        "score": {"type": "number"},
        "score_kind": {"type": "string"},
        "warning": {"type": ["string", "null"]},
        "strength": {"enum": ["strong", "weak", "unrelated", None]},
        "duplicates": {"type": "array", "items": _object(duplicate)},
    }
    words: Schema = {"type": "array", "items": {"type": "string"}}
    page = {
        "hits": {"type": "array", "items": _ref("Hit")},
        "generation": {"type": "integer"},
        "next_offset": {"type": ["integer", "null"]},
        "query_id": {"type": "string"},
        "unknown_words": words,
        "notes": words,
        "model_domain": {"type": "string"},
    }
    answer = {
        "question": {"type": "string"},
        "answer": {"type": ["string", "null"]},
        "choices": {
            "type": "array",
            "items": _object({"text": {"type": "string"}, "score": {"type": "number"}}),
        },
        "evidence": _ref("Hit"),
        "unknown_words": words,
        "model_domain": {"type": "string"},
    }
    job = {
        "id": {"type": "string"},
        "folder": {"type": "string"},
        "state": {"enum": ["running", "done", "failed", "cancelled"]},
        "stage": {"type": "string"},
        "done": {"type": "number"},
        "total": {"type": ["number", "null"]},
        "report": {"type": ["object", "null"]},
        "message": {"type": ["string", "null"]},
        "started": {"type": "number"},
        "ended": {"type": ["number", "null"]},
    }
    error = _object({"code": {"type": "string"}, "message": {"type": "string"}})
    return {
        "Hit": _object(hit),
        "Page": _object(page),
        "Answer": _object(answer),
        "Job": _object(job),
        "Error": _object({"error": error}),
        **_known_items(),
        **_requests(limits),
    }


def _known_items() -> Schema:
    known = {
        "key": {"type": "string"},
        "text": {"type": "string"},
        "video_id": {"type": ["string", "null"]},
        "video": {"type": "string"},
        "start_s": {"type": ["number", "null"]},
        "end_s": {"type": ["number", "null"]},
    }
    return {
        "KnownItem": _object(known),
        "KnownItems": _object(
            {"queries": {"type": "array", "items": _ref("KnownItem")}, "command": {"type": "string"}}
        ),
    }


def _requests(limits: Limits) -> Schema:
    text = {"type": "string", "minLength": 1, "maxLength": limits.max_text}
    where = {"type": ["string", "null"], "maxLength": limits.max_where, "description": "duration_s > 60"}
    top_k = {"type": "integer", "minimum": 1, "maximum": limits.max_top_k, "default": 10}
    offset = {"type": "integer", "minimum": 0, "maximum": limits.max_top_k, "default": 0}
    video_id = {"type": "string", "maxLength": 64}
    weight = {"type": "number", "minimum": -100, "maximum": 100, "default": 1}
    moment = {"video_id": video_id, "start_s": {"type": "number", "minimum": 0}}
    part = _object(
        {"text": text, "query_id": {"type": "string", "maxLength": 64}, **moment, "weight": weight},
        required=[],
    )
    search = {
        "text": text,
        "parts": {"type": "array", "items": part, "minItems": 1, "maxItems": MAX_PARTS},
        "unlike": {"type": "array", "items": _object(moment), "maxItems": MAX_PARTS},
        "group": {"type": "boolean", "default": True},
        "words": {"type": "boolean", "default": False},
        "min_strength": {"enum": ["strong", "weak", None]},
        "aggregate": {"enum": ["max", "mean"], "default": "max"},
        "query_id": {"type": "string", "maxLength": 64},
        "top_k": top_k,
        "offset": offset,
        "rerank": {"type": "integer", "minimum": 0, "maximum": limits.max_rerank, "default": 0},
        "where": where,
    }
    similar = {
        "video_id": video_id,
        "start_s": {"type": "number", "minimum": 0},
        "top_k": top_k,
        "offset": offset,
        "where": where,
    }
    choices = {"type": ["array", "null"], "items": text, "minItems": 2, "maxItems": limits.max_choices}
    return {
        "SearchRequest": _object(search, required=[]),
        "SimilarRequest": _object(similar, required=["video_id", "start_s"]),
        "AskRequest": _object(
            {"question": text, "choices": choices, "video_id": {**video_id, "type": ["string", "null"]}},
            required=["question"],
        ),
        "StarRequest": _object({"text": text, **moment, "end_s": {"type": "number", "exclusiveMinimum": 0}}),
        "IngestRequest": _object({"folder": {"type": "string", "maxLength": 100}}),
    }


def _search_paths(limits: Limits) -> Schema:
    def upload(kind: str, largest: int) -> Schema:
        content = {f"{kind}/*": {"schema": {"type": "string", "maxLength": largest}}}
        return {
            "post": {
                "summary": f"Search by a {kind}, whose bytes are the body",
                "parameters": [_query("top_k", "integer"), _query("where", "string")],
                "requestBody": {"required": True, "content": content},
                "responses": _answers("Page"),
            }
        }

    return {
        "/api/search": _post("Search by words or a sum, or get a further page", "SearchRequest", "Page"),
        "/api/search/image": upload("image", limits.max_image_bytes),
        "/api/search/video": upload("video", limits.max_video_bytes),
        "/api/similar": _post("Find moments of other videos like an indexed one", "SimilarRequest", "Page"),
        "/api/ask": _post("Answer a question, and show where", "AskRequest", "Answer"),
    }


def _video_paths() -> Schema:
    video = _path("video_id")
    span = [_query("start_s", "number", True), _query("end_s", "number", True)]
    at = [_query("at_s", "number"), _query("width", "integer")]
    return {
        "/api/videos/{video_id}": _get("What a video is, and how a browser can play it", None, [video]),
        "/api/videos/{video_id}/content": _bytes("The file, or a byte range of it", "video/*", [video]),
        "/api/videos/{video_id}/thumbnail": _bytes("The frame at a time", "image/jpeg", [video, *at]),
        "/api/videos/{video_id}/filmstrip": _bytes("Eight frames in a row", "image/jpeg", [video, *span]),
        "/api/videos/{video_id}/playback": _get(
            "Where a stretch lies in a form that browsers play", None, [video, *span]
        ),
        "/api/clips/{name}": _bytes("A prepared clip, or a byte range of it", "video/*", [_path("name")]),
    }


def _ingest_paths() -> Schema:
    overview = _get("The folders that may be indexed, and the jobs", None, [])
    start = _post("Begin to index a folder", "IngestRequest", "Job", "202")
    one = _get("How a job stands", "Job", [_path("job_id")])
    stop = {"summary": "Stop a job", "parameters": [_path("job_id")], "responses": _answers("Job")}
    return {"/api/ingest": {**overview, **start}, "/api/ingest/{job_id}": {**one, "delete": stop}}


def _query_paths(is_on: bool) -> Schema:
    overview = _get(
        "The texts whose moments are known, and the command that measures the index with them",
        "KnownItems",
        [],
    )
    star = _post(
        "Keep a text with the moment that it should find; the same twice is one", "StarRequest", "KnownItem"
    )
    unstar = {"summary": "Forget one", "parameters": [_path("key")], "responses": _answers("KnownItem")}
    paths = {"/api/queries": {**overview, **star}, "/api/queries/{key}": {"delete": unstar}}
    off = "This server was started without --queries FILE.csv: it keeps none, and answers 404."
    on = "They are rows of the file that this server was started with (--queries)."
    for calls in paths.values():
        for call in calls.values():
            call["description"] = on if is_on else off
    return paths


def _system_paths() -> Schema:
    session = _get("Whether a token is needed, and a session is open", None, [])
    begin = {"summary": "Begin a session with the token", "responses": _answers(None)}
    end = {"summary": "End the session", "responses": _answers(None)}
    return {
        "/": _bytes("The web page", "text/html", []),
        "/static/{name}": _bytes("A file of the web page", "*/*", [_path("name")]),
        "/healthz": _bytes("Whether the process lives", "text/plain", []),
        "/readyz": _bytes("Whether requests can be served", "text/plain", []),
        "/metrics": _bytes("Metrics for Prometheus", "text/plain", []),
        "/api/session": {**session, "post": begin, "delete": end},
        "/api/info": _get("What the index holds, and what its model can do", None, []),
        "/api/openapi.json": _get("This description", None, []),
    }


def _post(summary: str, request: str, answer: str, status: str = "200") -> Schema:
    body = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": _answers(answer, status)}}


def _get(summary: str, answer: str | None, parameters: list[Schema]) -> Schema:
    return {"get": {"summary": summary, "parameters": parameters, "responses": _answers(answer)}}


def _bytes(summary: str, kind: str, parameters: list[Schema]) -> Schema:
    content = {kind: {"schema": {"type": "string"}}}
    responses = {"200": {"description": "the bytes", "content": content}, "default": _failure()}
    return {"get": {"summary": summary, "parameters": parameters, "responses": responses}}


def _answers(schema: str | None, status: str = "200") -> Schema:
    content = {"application/json": {"schema": _ref(schema) if schema else {"type": "object"}}}
    return {status: {"description": "done", "content": content}, "default": _failure()}


def _failure() -> Schema:
    content = {"application/json": {"schema": _ref("Error")}}
    return {"description": "what was wrong, by a code and a sentence", "content": content}


def _query(name: str, kind: str, required: bool = False) -> Schema:
    return {"name": name, "in": "query", "required": required, "schema": {"type": kind}}


def _path(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    names = list(properties) if required is None else required
    return {
        "type": "object",
        "properties": properties,
        "required": names,
        "additionalProperties": False,
    }
