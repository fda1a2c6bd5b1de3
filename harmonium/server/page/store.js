// Conversations in this browser: one entry of localStorage each, so that a save writes only what changed.

const PREFIX = "harmonium.conversation.";

/** A new, empty one. It is stored when it is first saved. */
export function newConversation() {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? `${now}-${Math.random()}`, title: "", created: now, updated: now, messages: [] };
}

/** All of them, the latest first. Entries that cannot be read are left alone. */
export function allConversations() {
  return storedKeys().map(read).filter((found) => found !== null).sort((a, b) => b.updated - a.updated);
}

function storedKeys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return [];
  }
}

function read(key) {
  try {
    const found = JSON.parse(localStorage.getItem(key));
    return isConversation(found) ? found : null;
  } catch {
    return null;
  }
}

function isConversation(value) {
  return typeof value?.id === "string" && typeof value.title === "string" && Array.isArray(value.messages);
}

/** Whether it could be saved: the browser's storage may be full or forbidden. */
export function saveConversation(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export function deleteConversation(id) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // then there was nothing to delete
  }
}

/** Calls back when another tab changed a conversation. */
export function onOtherTab(callback) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) callback();
  });
}

/** Which conversation this tab shows, across reloads. */
export const shownId = {
  get: () => sessionStorage.getItem("harmonium.shown"),
  set: (id) => sessionStorage.setItem("harmonium.shown", id),
};

/** The file that "export" gives. */
export function exportText(conversations) {
  return JSON.stringify({ format: "harmonium.conversations", version: 1, conversations }, null, 2);
}
