// Light, dark, or as the system has it. Loaded before the first paint, so that no wrong color flashes.

const KEY = "harmonium.theme";
const CHOICES = ["system", "light", "dark"];

/** The user's choice: "system", "light" or "dark". */
export function themeChoice() {
  try {
    const choice = localStorage.getItem(KEY);
    return CHOICES.includes(choice) ? choice : "system";
  } catch {
    return "system"; // storage may be forbidden
  }
}

/** What is seen now. */
export function shownTheme() {
  const choice = themeChoice();
  if (choice !== "system") return choice;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

export function chooseTheme(choice) {
  try {
    localStorage.setItem(KEY, choice);
  } catch {
    // it then holds for as long as the page is open
  }
  apply(choice);
  dispatchEvent(new Event("themechange"));
}

function apply(choice) {
  if (choice === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
}

apply(themeChoice());
