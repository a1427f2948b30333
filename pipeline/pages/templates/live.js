// The live search page: an image or a row of the index, and what is nearest to it. Every value is shown as text.
"use strict";

const by = (selector, within = document) => within.querySelector(selector);
const file = by("#file"), count = by("#count"), others = by(".others"), head = by(".head");
let image = null; // the last that was dropped, pasted or chosen
let under = new AbortController(); // ends when the next search begins

async function ask(path, options = {}) {
  const response = await fetch(path, { signal: under.signal, ...options }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server does not answer. Is the command still running?");
  });
  const answer = await response.json().catch(() => ({ error: `The server failed (HTTP ${response.status}).` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function tell(text, isError = false) {
  by("#status").textContent = text;
  by("#status").classList.toggle("error", isError);
}

// A path or id, which may be broken into lines where a word of it ends.
function write(element, text) {
  const words = text ? text.split(/(?<=[/_])/) : [];
  element.replaceChildren(...words.flatMap((word) => [word, document.createElement("wbr")]));
}

function describe(figure, { name, place, size }) {
  write(by(".name", figure), name);
  write(by(".place", figure), place);
  by(".size", figure).textContent = size || "";
}

function showQuery(query) {
  const picture = by(".picture", head), none = by(".none", head);
  describe(head, query);
  picture.open = false;
  picture.hidden = !query.jpeg;
  none.hidden = !picture.hidden;
  none.textContent = `no preview: ${query.reason}`;
  by("img", head).src = query.jpeg || "data:,";
  by("img", head).alt = query.name;
}

function tileOf(near) {
  const tile = by("#tile").content.cloneNode(true).firstElementChild;
  const button = by("button", tile), signal = under.signal;
  by(".score", tile).textContent = near.score;
  by(".bar div", tile).style.width = `${100 * near.bar}%`;
  describe(tile, near);
  button.setAttribute("aria-label", `Search by ${near.name}, ${near.score}`);
  button.tabIndex = -1;
  button.onclick = () => { location.hash = `row=${near.row}`; };
  // Called when the tile is first shown.
  tile.load = async () => {
    tile.load = () => {};
    const found = await ask(`rows/${near.row}`).catch((error) => ({ reason: error.message }));
    if (signal.aborted) return;
    by(".size", tile).textContent = found.size || "";
    if (found.jpeg) by("img", tile).src = found.jpeg;
    else {
      button.classList.add("none");
      button.textContent = `no preview: ${found.reason}`;
    }
  };
  return tile;
}

function showCount() {
  by("#number").textContent = count.value;
  [...others.children].forEach((tile, rank) => {
    tile.hidden = rank >= count.value;
    if (!tile.hidden) tile.load();
  });
}

async function search(path, options, name) {
  under.abort();
  under = new AbortController();
  const { signal } = under, hadFocus = others.contains(document.activeElement);
  tell("Searching …");
  others.setAttribute("aria-busy", "true");
  try {
    const start = performance.now();
    const { query, near } = await ask(path, options);
    showQuery({ name, ...query });
    others.replaceChildren(...near.map(tileOf));
    by("#found").hidden = false;
    showCount();
    const seconds = ((performance.now() - start) / 1000).toFixed(2);
    tell(near.length ? `Found in ${seconds} s.` : "The index holds no other image.");
    const first = by("button", others);
    if (first) first.tabIndex = 0;
    if (hadFocus) (first || count).focus({ preventScroll: true });
    head.scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (!signal.aborted) tell(`${name}: ${error.message}`, true);
  }
  if (!signal.aborted) others.removeAttribute("aria-busy");
}

// Search by what the address names: a row of the index, or the image that was given last.
function go() {
  const row = /^#row=(\d+)$/.exec(location.hash);
  if (row) search(`rows/${row[1]}/near`, {}, `row ${row[1]}`);
  else if (image) search("near", { method: "POST", body: image }, image.name);
}

function take(files) {
  const most = Number(file.dataset.maxBytes), mib = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
  if (!files.length) return;
  if (files[0].size > most) {
    tell(`${files[0].name}: an image must have at most ${mib(most)}, this one has ${mib(files[0].size)}`, true);
    return;
  }
  image = files[0];
  if (location.hash) location.hash = "";
  else go();
}

function move(event) {
  const buttons = [...others.querySelectorAll("li:not([hidden]) button")], at = buttons.indexOf(event.target);
  const columns = buttons.filter((button) => button.offsetTop === buttons[0].offsetTop).length;
  const step = {
    ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: buttons.length - 1 - at,
  }[event.key];
  const next = buttons[at + step];
  if (at < 0 || !next) return;
  event.preventDefault();
  buttons[at].tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

file.onchange = () => { take([...file.files]); file.value = ""; };
count.oninput = showCount;
others.onkeydown = move;
addEventListener("hashchange", go);
addEventListener("paste", (event) => take(event.clipboardData.files));
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  take(event.dataTransfer.files);
});
go();
