"""Look inside: log-probabilities of a continuation, logits, hidden states, attention."""

import kbit

with kbit.load() as model:
    for ending in (" play outside.", " outside play."):
        logprobs = model.score("The children went to the park to", ending)
        print(f"{ending!r}: {logprobs.sum():.2f} nats over {len(logprobs)} tokens")

    out = model.forward("Once upon a time", hidden_states=True, attentions=True)
    print("logits", out.logits.shape, "hidden", len(out.hidden_states), out.hidden_states[-1].shape)
    print("attention", out.attentions[0].shape)
    best = int(out.logits[-1].argmax())
    print("next token:", repr(model.detokenize([best])))
