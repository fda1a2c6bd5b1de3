// The server's HTTP API. Addresses are relative to the page, so that it also works below a proxy's path.

import { eventData } from "./sse.js";
import { apiKey } from "./settings.js";

/** A request that failed. status 0: the server was not reached, or the connection broke. */
export class ApiFailure extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    this.name = "ApiFailure";
    Object.assign(this, { status, code, retryAfter });
  }
}

const address = (path) => new URL(path, document.baseURI);

function headers() {
  const key = apiKey();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function send(path, options) {
  try {
    return await fetch(address(path), { ...options, headers: headers(), credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && /header|ISO-8859-1/i.test(error.message)) {
      throw new ApiFailure("The API key holds letters that a key cannot have.", { status: 401 });
    }
    throw new ApiFailure("The server cannot be reached.");
  }
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // a proxy's page, or nothing
  }
  return new ApiFailure(error.message ?? `The server answered with status ${response.status}.`, {
    status: response.status,
    code: error.code ?? null,
    retryAfter: Number(response.headers.get("retry-after")) || null,
  });
}

/** Chunks of a chat completion as they come. Throws ApiFailure, or AbortError when the signal aborts it. */
export async function* chatChunks(body, signal) {
  const response = await send("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  if (!response.ok) throw await failure(response);
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiFailure(chunk.error.message, { status: 500, code: chunk.error.code });
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted) throw new DOMException("stopped", "AbortError");
    if (error instanceof ApiFailure) throw error;
  }
  throw new ApiFailure("The connection broke off before the answer was whole.");
}

/** {status, loaded} as /health says it; status "unreachable" when nothing answers. */
export async function health() {
  try {
    const response = await fetch(address("health"), { cache: "no-store" });
    return await response.json();
  } catch {
    return { status: "unreachable" };
  }
}

/** The first model that is served: {id, max_model_len}. Throws ApiFailure. */
export async function firstModel() {
  const response = await send("v1/models", { method: "GET" });
  if (!response.ok) throw await failure(response);
  return (await response.json()).data[0];
}
