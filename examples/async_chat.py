"""Answer many people at once with asyncio; their requests share batches."""

import asyncio

import kbit


async def main() -> None:
    with kbit.load() as model:
        tasks = [
            model.agenerate(f"{name} went to the", max_new_tokens=12, temperature=0.8, seed=i)
            for i, name in enumerate(("Tom", "Lily", "Ben", "Sue"))
        ]
        for done in await asyncio.gather(*tasks):
            print(done.text)

        async for piece in model.astream("Once upon a time", max_new_tokens=16):
            print(piece, end="", flush=True)
        print()


asyncio.run(main())
