"""Anthropic's package against a running server: python anthropic_client.py URL

Its newest version has no `temperature` of its own any more, so that goes in the extra body.
"""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
(model,) = [entry.id for entry in client.models.list()] or [None]
messages = [{"role": "user", "content": "Hi"}]
wish = {"model": model, "max_tokens": 8, "messages": messages, "extra_body": {"temperature": 0.0}}
whole = client.messages.create(**wish)
assert whole.stop_reason == "max_tokens"
with client.messages.stream(**wish) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text == whole.content[0].text == final.content[0].text
assert final.usage.output_tokens == 8
counted = client.messages.count_tokens(model=model, messages=wish["messages"])
usage = whole.usage
assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
try:
    client.messages.create(**{**wish, "extra_body": {"temperature": 2.0}})
except anthropic.BadRequestError as error:
    assert "temperature" in str(error)
else:
    raise AssertionError("a temperature of 2 was taken")
print("anthropic: messages, streams, count_tokens, errors: right")
