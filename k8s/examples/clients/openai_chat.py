"""Streams one chat through the gateway's OpenAI-compatible API, with OpenAI's own client (pip install openai)

Usage: openai_chat.py BASE_URL MODEL QUESTION
For example: openai_chat.py http://127.0.0.1:3000/v1 smollm2 "Say hello."
OPENAI_API_KEY is the key, where the gateway asks for one.
"""

import os
import sys

from openai import OpenAI


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    base_url, model, question = sys.argv[1:]
    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n  ({chunk.usage.completion_tokens} tokens)")


if __name__ == "__main__":
    main()
