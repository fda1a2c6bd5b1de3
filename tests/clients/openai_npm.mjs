// openai (npm) against BASE_URL: both APIs, streamed and not, and a tool loop. Prints one JSON object.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "sk-test-key", maxRetries: 0 });
const model = "scripted";
const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const question = { role: "user", content: "Weather in Oslo?" };

async function chatLoop() {
  const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
  const messages = [question];
  const first = await client.chat.completions.create({ model, messages, tools });
  const message = first.choices[0].message;
  const [call] = message.tool_calls;
  messages.push(message, { role: "tool", tool_call_id: call.id, content: "22 degrees" });
  const stream = client.chat.completions.stream({ model, messages, tools });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const final = await stream.finalChatCompletion();
  return { arguments: JSON.parse(call.function.arguments), streamed: text, text: final.choices[0].message.content };
}

async function responsesLoop() {
  const tools = [{ type: "function", name: "get_weather", parameters, strict: true }];
  const stream = await client.responses.create({ model, input: [question], tools, stream: true });
  const kinds = [];
  let first;
  for await (const event of stream) {
    kinds.push(event.type);
    if (event.type === "response.completed") first = event.response;
  }
  const call = first.output.find((item) => item.type === "function_call");
  const second = await client.responses.create({
    model,
    tools,
    previous_response_id: first.id,
    input: [{ type: "function_call_output", call_id: call.call_id, output: "22 degrees" }],
  });
  return { arguments: JSON.parse(call.arguments), kinds, text: second.output_text };
}

async function error() {
  try {
    await client.chat.completions.create({ model: "gpt-4", messages: [question] });
  } catch (problem) {
    return { name: problem.constructor.name, status: problem.status, code: problem.code };
  }
}

console.log(JSON.stringify({ chat: await chatLoop(), responses: await responsesLoop(), error: await error() }));
