// npm's `openai` against a running server: node openai_client.mjs URL
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const models = await client.models.list();
const model = models.data[0].id;
const messages = [{ role: "user", content: "Hi" }];
const base = { model, messages, temperature: 0, max_tokens: 12 };

const whole = await client.chat.completions.create({ ...base, logprobs: true, top_logprobs: 2 });
assert.equal(whole.usage.completion_tokens, 12);
assert.equal(whole.choices[0].logprobs.content[0].top_logprobs.length, 2);

let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({ ...base, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, 12);

const schema = { type: "object", properties: { sure: { type: "boolean" } }, required: ["sure"], additionalProperties: false };
const format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
const json = await client.chat.completions.create({ ...base, max_tokens: 60, response_format: format });
assert.equal(typeof JSON.parse(json.choices[0].message.content).sure, "boolean");

const text = await client.completions.create({ model, prompt: "def main():", max_tokens: 5, temperature: 0 });
assert.equal(text.choices[0].finish_reason, "length");
const response = await client.responses.create({ model, input: "Hi", max_output_tokens: 5 });
assert.equal(response.usage.output_tokens, 5);

await assert.rejects(client.chat.completions.create({ ...base, temperature: 9 }), (error) => error.status === 400 && error.param === "temperature");
await assert.rejects(client.chat.completions.create({ ...base, model: "other" }), (error) => error.status === 404);

const controller = new AbortController();
const long = await client.chat.completions.create({ ...base, max_tokens: 1000, stream: true }, { signal: controller.signal });
for await (const _ of long) { controller.abort(); break; }
console.log("npm openai: chat, streams, logprobs, JSON schema, completions, responses, errors, abort: right");
