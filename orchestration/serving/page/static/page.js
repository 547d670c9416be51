// What the page does in the browser alone; everything else is in Python.
globalThis.chatray = {
  follows: true,
  bottom() {
    window.scrollTo(0, document.documentElement.scrollHeight);
  },
  // Keep the end of the conversation in view from now on, until somebody scrolls up.
  follow() {
    chatray.follows = true;
    chatray.bottom();
  },
  // On a phone that would open its keyboard.
  focus() {
    if (matchMedia("(pointer: coarse)").matches || (document.activeElement && document.activeElement !== document.body)) return;
    document.querySelector(".composer-text textarea")?.focus();
  },
  closeDrawer() {
    if (window.innerWidth < 1024) document.querySelector(".q-drawer__backdrop")?.click();
  },
};

window.addEventListener("scroll", () => {
  const page = document.documentElement;
  chatray.follows = page.scrollHeight - window.scrollY - window.innerHeight < 80;
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector(".q-dialog, .q-menu")) return;
  if (document.querySelector(".answer.writing")) emitEvent("chatray_stop");
});

// Links of an answer open in a tab of their own, which learns nothing of this one.
document.addEventListener("click", (event) => {
  const link = event.target.closest?.(".markdown a[href]");
  if (link) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
}, true);

window.addEventListener("popstate", () => location.reload());

document.addEventListener("DOMContentLoaded", () => {
  const watch = () => {
    const turns = document.querySelector(".turns");
    if (!turns) return void setTimeout(watch, 50);
    new ResizeObserver(() => chatray.follows && chatray.bottom()).observe(turns);
    chatray.bottom();
  };
  watch();
});
