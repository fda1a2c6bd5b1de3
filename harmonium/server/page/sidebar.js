// The list of conversations: choose, rename, export, delete with a way back.

import { byId, count, download, el, icon, iconButton } from "./dom.js";
import { allConversations, deleteConversation, exportText, onOtherTab, saveConversation } from "./store.js";
import { toast } from "./toast.js";

const NARROW = matchMedia("(max-width: 800px)");

/** actions: {choose(conversation), newChat(), shownId(), renamed(conversation), deleted(id)}. */
export class Sidebar {
  constructor(actions) {
    this.actions = actions;
    byId("new-chat").append(icon("plus"), "New chat");
    byId("new-chat").addEventListener("click", () => {
      actions.newChat();
      this.closeIfNarrow();
    });
    byId("export-all").addEventListener("click", () => download("harmonium-conversations.json", exportText(allConversations())));
    this.makeToggles();
    onOtherTab(() => this.refresh());
    this.refresh();
  }

  makeToggles() {
    byId("toggle-sidebar").append(icon("menu"));
    byId("close-sidebar").append(icon("close"));
    byId("toggle-sidebar").addEventListener("click", () => this.setOpen(!this.isOpen));
    byId("close-sidebar").addEventListener("click", () => this.setOpen(false));
    byId("scrim").addEventListener("click", () => this.setOpen(false));
    NARROW.addEventListener("change", () => this.setOpen(!NARROW.matches));
    this.setOpen(!NARROW.matches);
  }

  setOpen(isOpen) {
    const hadFocus = byId("sidebar").contains(document.activeElement);
    this.isOpen = isOpen;
    document.body.classList.toggle("sidebar-open", isOpen);
    byId("sidebar").inert = !isOpen;
    byId("main").inert = isOpen && NARROW.matches;
    byId("toggle-sidebar").setAttribute("aria-expanded", String(isOpen));
    if (isOpen && NARROW.matches) byId("close-sidebar").focus();
    if (!isOpen && hadFocus) byId("toggle-sidebar").focus();
  }

  /** Whether there was something to close. */
  closeIfNarrow() {
    const isDrawer = this.isOpen && NARROW.matches;
    if (isDrawer) this.setOpen(false);
    return isDrawer;
  }

  refresh() {
    const conversations = allConversations();
    byId("conversations").replaceChildren(...conversations.map((conversation) => this.row(conversation)));
    byId("export-all").disabled = conversations.length === 0;
    byId("export-all").textContent = conversations.length > 1 ? `Export all ${count(conversations.length)}` : "Export all";
  }

  row(conversation) {
    const isShown = conversation.id === this.actions.shownId();
    const name = conversation.title || "Untitled";
    const choose = () => {
      this.actions.choose(conversation);
      this.closeIfNarrow();
    };
    const row = el(
      "li",
      { class: isShown ? "row shown" : "row" },
      el("button", { type: "button", class: "row-title", title: name, "aria-current": isShown ? "true" : null, on: { click: choose } }, name),
      iconButton("pencil", `Rename ${name}`, () => this.rename(row, conversation)),
      iconButton("download", `Export ${name}`, () => download(fileName(conversation), exportText([conversation]))),
      iconButton("trash", `Delete ${name}`, () => this.remove(conversation)),
    );
    return row;
  }

  rename(row, conversation) {
    const field = el("input", { class: "rename", "aria-label": "New name", maxlength: "120" });
    field.value = conversation.title;
    const finish = (isKept) => {
      if (!field.isConnected) return;
      const title = field.value.trim();
      if (isKept && title) this.actions.renamed(conversation, title);
      this.refresh();
      byId("conversations").querySelector(`.shown .row-title`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) finish(true);
      if (event.key === "Escape") {
        event.stopPropagation(); // Escape also stops an answer
        field.value = "";
        finish(false);
      }
    });
    field.addEventListener("blur", () => finish(true));
    row.replaceChildren(field);
    field.select();
    field.focus();
  }

  remove(conversation) {
    deleteConversation(conversation.id);
    this.actions.deleted(conversation.id);
    this.refresh();
    toast(`Deleted \u201c${conversation.title || "Untitled"}\u201d`, "Undo", () => {
      saveConversation(conversation);
      this.refresh();
    });
  }
}

function fileName({ title }) {
  const words = title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "");
  return `harmonium-${words.slice(0, 40) || "conversation"}.json`;
}
