"""Generation on real models: goldens, the same tokens however they are asked for, cancellation, many callers."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import kbit
from kbit.generation import finish_all

pytestmark = pytest.mark.core
PROMPT = "Once upon a time"
SAMPLING = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 11, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared("golden/kbit-stories/golden.safetensors"))


# Against the outside


def test_kbit_stories_continues_the_golden_token_for_token(stories_f32, golden):
    expected = golden["greedy"].astype(np.uint32)
    done = stories_f32.generate(expected[:4], max_new_tokens=200, temperature=0, ignore_eos=True)
    assert done.token_ids == expected[4:].tolist()


def test_kbit_stories_scores_like_the_golden(stories_f32, golden):
    ids = golden["input_ids"].astype(np.uint32)
    found = stories_f32.score(ids[:1], ids[1:])
    assert np.abs(found - golden["token_logprobs"]).max() < 1e-4
    logits = stories_f32.forward(ids)[-16:]
    expected = golden["logits_tail"]
    assert np.abs(logits - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_stories260k_tells_the_known_story(shared, threads):
    path = shared("models/stories260K/stories260Ktok512.gguf")
    with kbit.load(path, threads=threads) as model:
        done = model.generate(PROMPT, max_new_tokens=60, temperature=0)
    assert (PROMPT + done.text).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park"
    )


def test_the_bundled_model_writes_words(stories):
    text = stories.generate(PROMPT, max_new_tokens=60).text
    assert text.startswith(",")
    assert sum(c.isalpha() or c.isspace() for c in text) > 0.85 * len(text)
    assert stories.bits_per_weight < 4.6


# The same however it is asked for


def test_stream_is_generate(stories):
    done = stories.generate(PROMPT, **SAMPLING)
    stream = stories.stream(PROMPT, **SAMPLING)
    assert "".join(stream) == stream.text == done.text
    assert (stream.token_ids, stream.finish_reason) == (done.token_ids, done.finish_reason)


def test_params_and_words_mean_the_same(stories):
    params = kbit.SamplingParams(**SAMPLING)
    assert stories.generate(PROMPT, params) == stories.generate(PROMPT, **SAMPLING)
    shorter = stories.generate(PROMPT, params, max_new_tokens=3)
    assert shorter.token_ids == stories.generate(PROMPT, params).token_ids[:3]
    assert shorter.finish_reason == "length"


def test_ids_are_the_text(stories):
    ids = stories.tokenize(PROMPT)
    for prompt in (ids, ids.tolist(), ids.astype(np.int64)):
        assert stories.generate(prompt, **SAMPLING) == stories.generate(PROMPT, **SAMPLING)


def test_a_batch_is_each_alone(stories):
    prompts = [PROMPT, "The dog", "A", "Tom and Lily went to the sea. " * 8]
    alone = [stories.generate(prompt, **SAMPLING) for prompt in prompts]
    assert stories.generate(prompts, **SAMPLING) == alone
    assert stories.generate([stories.tokenize(p) for p in prompts], **SAMPLING) == alone


def test_more_prompts_than_a_batch_holds(stories):
    prompts = [f"Story number {i}:" for i in range(40)]
    together = stories.generate(prompts, max_new_tokens=4)
    assert [c.token_ids for c in together[::13]] == [
        stories.generate(p, max_new_tokens=4).token_ids for p in prompts[::13]
    ]


def test_threads_do_not_change_tokens():
    found = []
    for threads in (1, 2, 3):
        with kbit.load(threads=threads) as model:
            done = model.generate(PROMPT, logprobs=2, **SAMPLING)
        found.append((done.token_ids, done.logprobs))
    assert found[0] == found[1] == found[2]


def test_many_threads_at_once(stories):
    expected = [stories.generate(PROMPT, **(SAMPLING | {"seed": s})) for s in range(4)]
    failures = []

    def work(seed):
        for _ in range(2):
            done = stories.generate(PROMPT, **(SAMPLING | {"seed": seed % 4}))
            if done != expected[seed % 4]:
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_asyncio_gives_the_same(stories):
    async def both():
        one, two = await asyncio.gather(
            stories.agenerate(PROMPT, **SAMPLING), stories.agenerate("The dog", **SAMPLING)
        )
        pieces = [piece async for piece in stories.astream(PROMPT, **SAMPLING)]
        return one, two, "".join(pieces)

    one, two, text = asyncio.run(both())
    assert one == stories.generate(PROMPT, **SAMPLING)
    assert two == stories.generate("The dog", **SAMPLING)
    assert text == one.text


# Sampling


def test_seeds(stories):
    same = [stories.generate(PROMPT, **SAMPLING) for _ in range(2)]
    assert same[0] == same[1]
    others = [stories.generate(PROMPT, **(SAMPLING | {"seed": s})) for s in range(5)]
    assert len({c.text for c in others}) > 1
    free = SAMPLING | {"seed": None, "temperature": 2.0}
    assert stories.generate(PROMPT, **free) != stories.generate(PROMPT, **free)


def test_n_completions_have_seeds_of_their_own(stories):
    several = stories.generate(PROMPT, n=3, **SAMPLING)
    assert several == [stories.generate(PROMPT, **(SAMPLING | {"seed": 11 + i})) for i in range(3)]
    nested = stories.generate([PROMPT, "The dog"], n=2, **SAMPLING)
    assert [len(group) for group in nested] == [2, 2]
    assert nested[0] == several[:2]
    with pytest.raises(ValueError, match="n = 2: a stream has one completion"):
        stories.stream(PROMPT, n=2)


def test_top_k_of_one_is_greedy(stories):
    greedy = stories.generate(PROMPT, max_new_tokens=12)
    picked = stories.generate(PROMPT, max_new_tokens=12, temperature=1.5, top_k=1, seed=3)
    assert picked.token_ids == greedy.token_ids


def test_logprobs_are_those_of_forward(stories):
    done = stories.generate(PROMPT, max_new_tokens=6, logprobs=3)
    ids = np.concatenate([stories.tokenize(PROMPT), np.asarray(done.token_ids, np.uint32)])
    logits = stories.forward(ids)[len(ids) - 7 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    expected -= logits.max(1, keepdims=True)
    for token, row in zip(done.logprobs, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        assert [i for i, _ in token.top] == np.argsort(-row, kind="stable")[:3].tolist()
        assert token.top[0] == (token.id, token.logprob)


# Where a text ends


def test_stop_strings_cut_the_text_and_count_the_tokens(stories):
    whole = stories.generate(PROMPT, max_new_tokens=40).text
    stop = whole[17:23]
    for stops in (stop, [stop, "never to be seen"]):
        done = stories.generate(PROMPT, max_new_tokens=40, stop=stops)
        assert done.text == whole[: whole.index(stop)]
        assert done.finish_reason == "stop"
        assert stop in stories.detokenize(done.token_ids)
    assert "".join(stories.stream(PROMPT, max_new_tokens=40, stop=stop)) == done.text


@settings(max_examples=10)
@given(st.data())
def test_any_stop_string_cuts_at_its_first_place(stories, data):
    whole = stories.generate(PROMPT, max_new_tokens=32).text
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[start : start + data.draw(st.integers(1, 9))]
    done = stories.generate(PROMPT, max_new_tokens=32, stop=stop)
    assert done.text == whole[: whole.index(stop)]


def test_end_of_text(stories):
    done = stories.generate("They lived happily ever after.", max_new_tokens=400, temperature=0)
    assert done.finish_reason in ("stop", "length")
    first = stories.generate(PROMPT, max_new_tokens=1).token_ids
    done = stories.generate(PROMPT, stop_token_ids=first)
    assert (done.token_ids, done.text, done.finish_reason) == (first, "", "stop")


def test_the_context_ends_it(stories):
    with kbit.load(context=32) as model:
        assert model.context == 32
        done = model.generate(PROMPT, max_new_tokens=500, ignore_eos=True)
        prompt = len(model.tokenize(PROMPT))
        assert done.finish_reason == "context"
        assert 32 - prompt <= len(done.token_ids) <= 33 - prompt
        with pytest.raises(kbit.ContextOverflowError, match=r"40.*32|32.*40"):
            model.generate(np.ones(40, np.uint32))
    same = stories.generate(PROMPT, max_new_tokens=500, ignore_eos=True).token_ids
    assert done.token_ids == same[: len(done.token_ids)]


# What is refused


@pytest.mark.parametrize("prompt", ["", [], np.zeros(0, np.uint32)])
def test_empty_prompts(stories, prompt):
    assert not len(stories.tokenize("")), "this model begins every text with a token"
    with pytest.raises(ValueError, match="empty"):
        stories.generate(prompt)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (np.array([1, 5000]), ValueError),
        (np.array([-1]), ValueError),
        (np.array([1.5]), TypeError),
        (np.zeros((2, 2, 2), np.uint32), ValueError),
        (7, ValueError),
        (None, (TypeError, ValueError)),
    ],
)
def test_wrong_prompts(stories, prompt, error):
    with pytest.raises(error):
        stories.generate(prompt)


def test_one_bad_prompt_fails_the_batch_and_leaves_the_engine_well(stories):
    with pytest.raises(ValueError, match="5000"):
        stories.generate([PROMPT, np.array([5000])])
    assert stories.generate(PROMPT, max_new_tokens=2).token_ids


def test_unknown_and_wrong_arguments(stories):
    with pytest.raises(TypeError, match="max_tokens"):
        stories.generate(PROMPT, max_tokens=3)
    with pytest.raises(ValueError, match="top_p"):
        stories.generate(PROMPT, top_p=0.0)


# Measuring


def test_score_of_texts_and_ids(stories):
    ids = stories.tokenize(PROMPT + " there was")
    cut = len(stories.tokenize(PROMPT))
    expected = stories.score(ids[:cut], ids[cut:])
    assert np.array_equal(stories.score(PROMPT, " there was"), expected)
    batch = stories.score([PROMPT, PROMPT], [" there was", " a"])
    assert np.array_equal(batch[0], expected)
    assert len(batch[1]) == len(stories.tokenize(PROMPT + " a")) - cut
    assert (expected <= 0).all()
    assert expected.sum() > stories.score(PROMPT, " xylophone zoo").sum()
    with pytest.raises(ValueError, match="each needs one"):
        stories.score(PROMPT, "")


def test_greedy_tokens_score_highest(stories):
    done = stories.generate(PROMPT, max_new_tokens=8, logprobs=0)
    found = stories.score(stories.tokenize(PROMPT), np.asarray(done.token_ids))
    assert found.tolist() == pytest.approx([t.logprob for t in done.logprobs], abs=1e-5)


def test_perplexity_is_that_of_the_scores(stories):
    text = "Tom had a dog. The dog liked to run. One day the dog ran to the park and saw a cat."
    ids = stories.tokenize(text, add_special_tokens=False)
    logprobs = [stories.engine.score(ids[i : i + 8]) for i in range(0, len(ids) - 1, 8)]
    expected = np.exp(-np.concatenate(logprobs).mean(dtype=np.float64))
    assert stories.perplexity(text, window=8) == pytest.approx(expected, rel=1e-9)
    assert stories.perplexity(ids, window=8) == stories.perplexity(text, window=8)
    for wrong in (0, 1, -3):
        with pytest.raises(ValueError, match=f"window = {wrong}"):
            stories.perplexity(text, window=wrong)
    with pytest.raises(ValueError, match="at least 2"):
        stories.perplexity([5])
    with pytest.raises(kbit.ContextOverflowError):
        stories.perplexity(np.zeros(stories.context + 1, np.uint32), window=stories.context + 1)
    with kbit.load(context=16) as short:
        assert short.perplexity(text) == stories.perplexity(text, window=16)


def test_forward_is_causal_and_complete(stories):
    ids = stories.tokenize(PROMPT + " there was a dog")
    out = stories.forward(ids, hidden_states=True, attentions=True)
    spec, n = stories.spec, len(ids)
    assert out.logits.shape == (n, spec.vocab_size)
    assert [h.shape for h in out.hidden_states] == [(n, spec.hidden_size)] * len(out.hidden_states)
    assert len(out.hidden_states) == len(spec.layers) + 1
    assert [a.shape for a in out.attentions] == [(spec.num_attention_heads, n, n)] * len(
        spec.layers
    )
    for attention in out.attentions:
        assert np.allclose(attention.sum(-1), 1, atol=1e-5)
        assert not np.triu(attention, 1).any()
    assert np.array_equal(stories.forward(ids[:-2]), out.logits[:-2])


# Ending early


def test_closing_a_stream_frees_the_engine(stories):
    stream = stories.stream(PROMPT, max_new_tokens=900, ignore_eos=True)
    next(stream)
    stream.close()
    assert stream.finish_reason == "cancelled"
    assert list(stream) == []
    assert stories.generate(PROMPT, max_new_tokens=2).token_ids


def test_a_cancelled_task_ends_its_request(stories):
    async def run():
        task = asyncio.create_task(stories.agenerate(PROMPT, max_new_tokens=900, ignore_eos=True))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert stories.generate(PROMPT, max_new_tokens=2).token_ids


def test_closing_the_model_ends_everything():
    model = kbit.load()
    stream = model.stream(PROMPT, max_new_tokens=900, ignore_eos=True)
    next(stream)
    model.close()
    model.close()
    with pytest.raises(kbit.DeviceError):
        list(stream)
    with pytest.raises(kbit.DeviceError):
        model.generate(PROMPT)


INTERRUPTED = """
import sys, time, kbit
model = kbit.load(threads=1)
print("ready", flush=True)
try:
    {call}
except KeyboardInterrupt:
    print("interrupted", flush=True)
    print(len(model.generate("a", max_new_tokens=2).token_ids), flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    "call",
    [
        "while True: model.generate('Once', max_new_tokens=1000, ignore_eos=True)",
        "while True: [None for _ in model.stream('Once', max_new_tokens=1000, ignore_eos=True)]",
        "while True: model.forward(list(range(1000)))",
        "while True: model.perplexity(list(range(1000)), window=1000)",
    ],
    ids=["generate", "stream", "forward", "perplexity"],
)
def test_ctrl_c_ends_a_long_call_at_once(call):
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED.format(call=call)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        begin = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted\n"
        took = time.monotonic() - begin
        assert child.stdout.readline() == "2\n"
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert took < 0.25


def test_a_long_list_is_submitted_as_the_first_ones_finish():
    waiting, most = set(), []

    class Started:
        def __init__(self, number):
            self.number = number
            waiting.add(number)
            most.append(len(waiting))

        def result(self):
            if self.number == 7:
                raise ValueError("the seventh")
            waiting.discard(self.number)
            return self.number

        def close(self):
            waiting.discard(self.number)

    starts = [partial(Started, number) for number in range(7)]
    assert finish_all(starts, at_once=3) == list(range(7))
    assert max(most) == 3
    starts = [partial(Started, number) for number in range(20)]
    with pytest.raises(ValueError, match="the seventh"):
        finish_all(starts, at_once=3)
    assert not waiting
    assert len(most) == 7 + 10
