#!/usr/bin/env python3
"""Runs the official `openai` client against a running `tinyllama serve`.

    python scripts/check_openai.py http://127.0.0.1:8000/v1 [--key KEY]

Needs `pip install openai`. Chat, streams, completions, log-probabilities, n, stop, seed, usage, and what must be refused.
"""

import argparse

import openai


def check(condition, what):
    assert condition, what
    print("ok:", what)


def refused(what, kind, call, **fields):
    try:
        call()
    except kind as error:
        for name, value in fields.items():
            assert getattr(error, name) == value, f"{what}: {name} is {getattr(error, name)!r}, not {value!r}"
        print("ok:", what, "->", error.status_code, error.message.split("'message': ")[-1][:110])
        return
    raise AssertionError(f"{what}: not refused")


def chat(client, model):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What do llamas eat?"}]
    create = client.chat.completions.create
    answer = create(model=model, messages=talk, max_tokens=12, seed=0, temperature=0)
    choice = answer.choices[0]
    check(choice.message.role == "assistant" and choice.message.content, f"chat: {choice.message.content!r}")
    check(choice.finish_reason in ("stop", "length"), "finish_reason")
    usage = answer.usage
    check(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, "usage adds up")
    check(usage.completion_tokens <= 12, "max_tokens")
    answer = create(model=model, messages=talk, max_completion_tokens=5, seed=0)
    check(answer.usage.completion_tokens <= 5, "max_completion_tokens")

    text, reason, last = "", None, None
    options = {"include_usage": True}
    stream = create(
        model=model, messages=talk, max_tokens=12, seed=0, temperature=0, stream=True, stream_options=options
    )
    for event in stream:
        last = event
        for part in event.choices:
            text += part.delta.content or ""
            reason = part.finish_reason or reason
    check(text == choice.message.content and reason == choice.finish_reason, "the stream adds up to the answer")
    check(last.usage is not None and not last.choices, "usage comes with the last event")

    several = create(model=model, messages=talk, max_tokens=8, n=3, seed=1)
    check([c.index for c in several.choices] == [0, 1, 2], "n answers")
    again = create(model=model, messages=talk, max_tokens=8, n=3, seed=1)
    same = [c.message.content for c in several.choices] == [c.message.content for c in again.choices]
    check(same, "the same seed, the same answers")

    logprobs = create(model=model, messages=talk, max_tokens=4, logprobs=True, top_logprobs=3, seed=0)
    tokens = logprobs.choices[0].logprobs.content
    check(tokens and all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in tokens), "logprobs")
    parts = [{"role": "user", "content": [{"type": "text", "text": "What do "}, {"type": "text", "text": "llamas eat?"}]}]
    check(create(model=model, messages=parts, max_tokens=2).choices, "content in parts")
    with create(model=model, messages=talk, stream=True, max_tokens=500) as left:
        next(iter(left))
    check(True, "a stream can be left")


def completions(client, model):
    create = client.completions.create
    answer = create(model=model, prompt="Llamas eat", max_tokens=12, seed=0, temperature=0)
    text = answer.choices[0].text
    check(text and answer.object == "text_completion", f"completion: {text!r}")
    stream = create(model=model, prompt="Llamas eat", max_tokens=12, seed=0, temperature=0, stream=True)
    check("".join(c.text for event in stream for c in event.choices) == text, "the stream adds up")
    stop = text[3:6]
    stopped = create(model=model, prompt="Llamas eat", max_tokens=12, seed=0, temperature=0, stop=[stop, "\x00"])
    check(stopped.choices[0].text == text.split(stop)[0], f"stop at {stop!r}")
    check(stopped.choices[0].finish_reason == "stop", "its finish_reason")
    echo = create(model=model, prompt="Llamas eat", max_tokens=2, echo=True)
    check(echo.choices[0].text.startswith("Llamas eat"), "echo")
    several = create(model=model, prompt=["One", "Two"], n=2, max_tokens=3)
    check([c.index for c in several.choices] == [0, 1, 2, 3], "several prompts, n of each")
    ids = create(model=model, prompt=[5, 6, 7], max_tokens=2)
    check(ids.usage.prompt_tokens == 3, "a prompt of token ids")
    told = create(model=model, prompt="Llamas eat", max_tokens=4, logprobs=2, seed=0).choices[0].logprobs
    check(len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset), "logprobs")
    extra = {"top_k": 5, "repetition_penalty": 1.1, "ignore_eos": True}
    check(create(model=model, prompt="a", max_tokens=3, extra_body=extra).usage.completion_tokens == 3, "extensions")


def refusals(client, model, url):
    talk = [{"role": "user", "content": "Hi"}]
    create = client.chat.completions.create
    bad = openai.BadRequestError
    refused("unknown model", openai.NotFoundError, lambda: create(model="gpt-4", messages=talk), code="model_not_found")
    ask = lambda **fields: lambda: create(**{"model": model, "messages": talk, **fields})
    refused("negative max_tokens", bad, ask(max_tokens=-1), param="max_tokens")
    refused("huge max_tokens", bad, ask(max_tokens=10**9), param="max_tokens")
    refused("temperature of another type", bad, ask(temperature="hot"), param="temperature")
    refused("no messages", bad, ask(messages=[]), param="messages")
    refused("another role", bad, ask(messages=[{"role": "bot", "content": "x"}]), param="messages[0].role")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    refused("an image", bad, ask(messages=image), code="unsupported_parameter")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    refused("tools", bad, ask(tools=tools), param="tools")
    refused("five stop strings", bad, ask(stop=list("abcde")), param="stop")
    refused("a mistyped field", bad, ask(extra_body={"temprature": 1}), code="unknown_parameter")
    long = [{"role": "user", "content": "llama " * 20_000}]
    refused("a long prompt", bad, ask(messages=long), code="context_length_exceeded")
    huge = [{"role": "user", "content": "x" * 10_000_000}]
    refused("10 MB", openai.APIStatusError, ask(messages=huge), status_code=413)
    other = openai.OpenAI(base_url=url + "/nowhere", api_key="none", max_retries=0)
    refused("another path", openai.APIStatusError, lambda: other.models.list())
    check(create(model=model, messages=talk, max_tokens=1).choices, "and the server goes on")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.url, api_key=args.key, max_retries=0, timeout=120)
    model = client.models.list().data[0].id
    check(client.models.retrieve(model).id == model, f"the model is {model}")
    chat(client, model)
    completions(client, model)
    refusals(client, model, args.url)
    if args.key != "none":
        wrong = openai.OpenAI(base_url=args.url, api_key="wrong", max_retries=0)
        refused("a wrong key", openai.AuthenticationError, lambda: wrong.models.list())
    print(f"openai {openai.__version__}: all well")


if __name__ == "__main__":
    main()
