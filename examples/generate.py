"""Generate text: at once, piece by piece, and several prompts in one batch."""

import kbit

with (
    kbit.load() as model
):  # the bundled model; or a directory, a .gguf file, a hub id, with bits=2..8
    print(model)

    done = model.generate("Once upon a time", max_new_tokens=24, temperature=0)
    print(done.text)
    print(f"{done.finish_reason}, {done.timings.decode_tokens_per_second:,.0f} tokens/s")

    for piece in model.stream("The dog", max_new_tokens=24, temperature=0.8, top_p=0.9, seed=1):
        print(piece, end="", flush=True)
    print()

    prompts = ["Tom had a red ball.", "Lily saw a bird."]
    for prompt, done in zip(prompts, model.generate(prompts, max_new_tokens=16), strict=True):
        print(prompt + done.text)
