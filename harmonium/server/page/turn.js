// One answer of the model: the request for it, and the message that its chunks add up to.

import { chatChunks } from "./api.js";
import { parseTools } from "./settings.js";

/** An answer that has not begun. */
export function emptyAnswer() {
  return { role: "assistant", reasoning: "", content: "", toolCalls: [], diagnostics: [], finish: null, usage: null, times: {} };
}

/** Everything that the model reads, as the Chat Completions API takes it. */
export function requestBody(messages, settings) {
  const { system, temperature, maxTokens, effort } = settings;
  const tools = parseTools(settings.tools);
  return {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages.filter(isSaid).map(apiMessage)],
    reasoning_effort: effort,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...(temperature === null ? {} : { temperature }),
    ...(maxTokens === null ? {} : { max_completion_tokens: maxTokens }),
    ...(tools ? { tools } : {}),
  };
}

/** An answer that failed before its first word is none. */
const isSaid = (message) => message.role !== "assistant" || Boolean(message.content) || message.toolCalls.length > 0;

function apiMessage(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.callId, content: message.content };
  if (message.role === "user") return { role: "user", content: message.content };
  const calls = message.toolCalls.map(({ id, type, name, text }) =>
    type === "custom" ? { id, type, custom: { name, input: text } } : { id, type, function: { name, arguments: text } },
  );
  return {
    role: "assistant",
    content: message.content || null,
    ...(message.reasoning ? { reasoning_content: message.reasoning } : {}),
    ...(calls.length ? { tool_calls: calls } : {}),
  };
}

/** Fill the answer while its chunks come; onChange is called after each. Throws ApiFailure or AbortError. */
export async function streamInto(answer, body, signal, onChange) {
  answer.times.began = performance.now();
  try {
    for await (const chunk of chatChunks(body, signal)) {
      take(answer, chunk);
      onChange();
    }
  } finally {
    settleTimes(answer);
  }
}

/** Add what this chunk says. */
export function take(answer, chunk) {
  const choice = chunk.choices[0];
  if (choice) takeDelta(answer, choice.delta ?? {});
  if (choice?.finish_reason) answer.finish = choice.finish_reason;
  if (choice?.diagnostics) answer.diagnostics = choice.diagnostics;
  if (chunk.usage) takeUsage(answer, chunk.usage);
}

function takeDelta(answer, delta) {
  const now = performance.now();
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
  const isText = Boolean(reasoning || delta.content || delta.tool_calls);
  if (isText) answer.times.first ??= now;
  if (reasoning) {
    answer.reasoning += reasoning;
    answer.times.reasoningEnd = now;
  }
  answer.content += delta.content ?? "";
  for (const call of delta.tool_calls ?? []) takeCall(answer, call);
}

function takeCall(answer, delta) {
  const call = (answer.toolCalls[delta.index] ??= { id: delta.id, type: delta.type ?? "function", name: "", text: "" });
  const part = delta.function ?? delta.custom ?? {};
  call.name += part.name ?? "";
  call.text += part.arguments ?? part.input ?? "";
}

function takeUsage(answer, usage) {
  answer.times.firstTokens ??= usage.completion_tokens || undefined;
  answer.times.last = performance.now();
  answer.usage = {
    prompt: usage.prompt_tokens,
    completion: usage.completion_tokens,
    reasoning: usage.completion_tokens_details?.reasoning_tokens ?? 0,
  };
}

/** Tokens a second from the first token to the last one; null while there is too little to tell. */
export function tokensPerSecond({ usage, times, speed }) {
  if (speed !== undefined) return speed;
  const seconds = (times.last - times.first) / 1000;
  const tokens = (usage?.completion ?? 0) - (times.firstTokens ?? 0);
  return seconds > 0.05 && tokens > 1 ? tokens / seconds : null;
}

/** What is kept of the clock: it starts anew with each load of the page. */
function settleTimes(answer) {
  const { began, first, reasoningEnd } = answer.times;
  answer.speed = tokensPerSecond(answer);
  answer.firstSeconds = first === undefined ? null : (first - began) / 1000;
  answer.reasoningSeconds = reasoningEnd === undefined ? null : (reasoningEnd - first) / 1000;
}
