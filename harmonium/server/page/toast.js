// A short message at the foot of the page, with one thing that can be done about it.

import { byId, el } from "./dom.js";

const SECONDS = 8;
let timer = 0;

/** Show it for some seconds; a pointer or the focus on it keeps it. */
export function toast(text, label = null, act = null) {
  const box = byId("toast");
  const hide = () => {
    if (box.matches(":hover") || box.contains(document.activeElement)) timer = setTimeout(hide, 1000);
    else box.hidden = true;
  };
  const button = label && el("button", { type: "button", class: "quiet", on: { click: () => { act(); box.hidden = true; } } }, label);
  box.replaceChildren(el("span", {}, text), ...(button ? [button] : []));
  box.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(hide, SECONDS * 1000);
}
