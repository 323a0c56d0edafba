"""A trained model as a service: a text's vector, and what was written for it.

    python service.py runs/quickstart/model
    curl 'http://127.0.0.1:8000/embed?text=A+dog+runs.&text=A+cat+sleeps.'

With a second address what is written comes from a vLLM server, which serves many at once; this
process then only reads it:

    vllm serve runs/quickstart/model --port 8001
    python service.py runs/quickstart/model http://127.0.0.1:8001
"""

from __future__ import annotations

import sys

import requests
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from grace_rl import RationaleEncoder


def service(model: str, writer: str | None = None) -> Starlette:
    encoder = RationaleEncoder.from_pretrained(model)

    def embed(request: Request) -> JSONResponse:
        texts = request.query_params.getlist("text")
        if writer is None:
            encoded = encoder.encode(texts)  # one call after the other: the encoder sees to that
            rationales, vectors = encoded.rationales, encoded.vectors
        else:
            rationales = written_by(writer, model, encoder, texts)
            vectors = encoder.encode_rationales(rationales, texts)
        return JSONResponse({"rationales": rationales, "vectors": vectors.tolist()})

    return Starlette(routes=[Route("/embed", embed)])


def written_by(writer: str, model: str, encoder: RationaleEncoder, texts: list[str]) -> list[str]:
    """What vLLM's server writes for texts, greedily."""
    asked = {
        "model": model,
        "prompt": [encoder.template.render(text).token_ids for text in texts],
        "max_tokens": encoder.max_rationale_tokens,
        "temperature": 0,
    }
    answer = requests.post(f"{writer}/v1/completions", json=asked, timeout=600)
    answer.raise_for_status()
    return [choice["text"] for choice in sorted(answer.json()["choices"], key=lambda c: c["index"])]


if __name__ == "__main__":
    uvicorn.run(service(*sys.argv[1:3]), host="127.0.0.1", port=8000)
