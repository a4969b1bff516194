"""Having folders indexed, and watching it."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vlm.serving.schemas import parse_ingest
from vlm.serving.state import state_of
from vlm.serving.transport.bodies import read_json


async def overview(request: Request) -> Response:
    """Return the names of the folders that may be indexed, and the jobs so far."""
    jobs = state_of(request).jobs
    return JSONResponse({"folders": sorted(jobs.folders), "jobs": [job.values() for job in jobs.list()]})


async def start(request: Request) -> Response:
    """Begin to index a folder."""
    state = state_of(request)
    limits = state.limits
    wanted = parse_ingest(await read_json(request, limits.max_json_bytes, limits.body_timeout_s))
    job = await asyncio.to_thread(state.jobs.start, wanted.folder)
    return JSONResponse(job.values(), 202)


async def job(request: Request) -> Response:
    """Return how a job stands."""
    return JSONResponse(state_of(request).jobs.find(request.path_params["job_id"]).values())


async def cancel(request: Request) -> Response:
    """Stop a job."""
    return JSONResponse(state_of(request).jobs.cancel(request.path_params["job_id"]).values())


ROUTES = [
    Route("/api/ingest", overview, methods=["GET"]),
    Route("/api/ingest", start, methods=["POST"]),
    Route("/api/ingest/{job_id}", job, methods=["GET"]),
    Route("/api/ingest/{job_id}", cancel, methods=["DELETE"]),
]
