// Vercel AI SDK against BASE_URL: streamText with tools, generateObject; provider named by the first argument.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, isStepCount, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const options = { baseURL: process.env.BASE_URL, apiKey: "sk-test-key" };
const providers = {
  responses: () => createOpenAI(options)("scripted"),
  chat: () => createOpenAI(options).chat("scripted"),
  compatible: () =>
    createOpenAICompatible({ ...options, name: "harmonium", supportsStructuredOutputs: true })("scripted"),
};
const model = providers[process.argv[2]]();

async function tools() {
  const problems = [];
  const result = streamText({
    model,
    prompt: "Weather in Oslo?",
    maxRetries: 0,
    stopWhen: (stepCountIs ?? isStepCount)(4),
    onError: ({ error }) => problems.push(String(error)),
    tools: {
      get_weather: tool({
        description: "Weather of a city",
        inputSchema: z.object({ city: z.string() }),
        execute: async ({ city }) => `22 degrees in ${city}`,
      }),
    },
  });
  let text = "";
  let reasoning = "";
  for await (const part of result.fullStream) {
    if (part.type === "text-delta") text += part.text;
    if (part.type === "reasoning-delta") reasoning += part.text;
  }
  const steps = await result.steps;
  return { text, reasoning, problems, calls: steps.flatMap((step) => step.toolCalls.map((call) => call.input)) };
}

async function object() {
  const schema = z.object({ name: z.string(), guests: z.array(z.string()) });
  const result = await generateObject({ model, schema, prompt: "Plan a party.", maxRetries: 0 });
  return result.object;
}

console.log(JSON.stringify({ tools: await tools(), object: await object() }));
