// What a failed request is told as: words for the reader, and what can be done about it.

/** {text, action}: action is "key", "new", "retry" or null. */
export function explain({ status, code, message, retryAfter }) {
  if (status === 401) return { text: "This server asks for an API key, and the one it got is missing or wrong.", action: "key" };
  if (code === "context_length_exceeded") {
    return { text: `This conversation is longer than what the model can read (${message}). Start a new one, or ask for less.`, action: "new" };
  }
  if (code === "server_loading") return { text: "The model is still loading. Your message was kept; send it again when it is ready.", action: "retry" };
  if (code === "server_draining") return { text: "The server is shutting down and takes no new messages.", action: "retry" };
  if (status === 429 || status === 503) {
    const wait = retryAfter ? ` It asks to wait ${retryAfter} s.` : "";
    return { text: `The server is busy: ${message}${wait}`, action: "retry" };
  }
  return { text: message, action: "retry" };
}
