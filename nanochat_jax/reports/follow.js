// ---- A page that report --watch serves has a version, and replaces what it shows when there is another one.
const SECONDS = 2;

function eachKept(root, visit) { // what a reader has opened, closed or hidden
  for (const element of root.querySelectorAll("[data-key]")) {
    visit(element.dataset.key, element, element.localName === "details" ? "open" : "checked");
  }
}

function replaceBy(fresh) {
  const kept = new Map(), position = [scrollX, scrollY], focused = document.activeElement?.dataset.key;
  eachKept(document, (key, element, state) => kept.set(key, element[state]));
  eachKept(fresh, (key, element, state) => { if (kept.has(key)) element[state] = kept.get(key); });
  for (const name of ["style", "main"]) {
    document.querySelector(name).replaceWith(document.adoptNode(fresh.querySelector(name)));
  }
  document.documentElement.dataset.version = fresh.documentElement.dataset.version;
  zoomAgain();
  scrollTo(...position);
  eachKept(document, (key, element) => { if (key === focused) element.focus({ preventScroll: true }); });
}

async function refresh() {
  try {
    const { headers, ok } = await fetch("/", { method: "HEAD", cache: "no-store" });
    if (!ok) throw new Error("refused");
    document.documentElement.classList.remove("ended");
    const version = headers.get("ETag").slice(1, -1);
    if (version === document.documentElement.dataset.version) return;
    const text = await (await fetch("/", { cache: "no-store" })).text();
    replaceBy(new DOMParser().parseFromString(text, "text/html"));
  } catch {
    document.documentElement.classList.add("ended"); // the style sheet says so
  }
}

async function keepFresh() {
  // What is being selected stays, and nobody asks for a page that nobody sees.
  if (!document.hidden && getSelection().isCollapsed && !drag) await refresh();
  setTimeout(keepFresh, 1000 * SECONDS);
}

if (document.documentElement.dataset.version) setTimeout(keepFresh, 1000 * SECONDS);
