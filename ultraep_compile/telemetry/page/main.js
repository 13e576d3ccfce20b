// State, controls and the order in which things are drawn. The address after # keeps the state.

const CHOICES = { view: ["after", "before"], hist: ["all", "layer"], time: ["stack", "map"], map: ["one", "all"], scale: ["one", "own"] };
const state = { layer: 0, mb: 0, view: "before", hist: "all", time: "stack", map: "one", scale: "one" };
const DRAW = {
  layer: [drawTime, drawRecord, drawTraffic, drawLeaving, drawRealised, drawPhases, drawLayers, () => state.hist === "layer" && drawHist(), markHeat],
  mb: [drawRecord, markHeat, markTime],
  view: [drawHeat, drawWorst, drawTime, drawTraffic],
  hist: [drawHist], time: [drawTime], map: [drawReplicas], scale: [drawHeat, drawRecord],
};
const ALL = [drawHeat, drawHist, drawWorst, drawTime, drawRecord, drawTraffic, drawLeaving, drawRealised, drawPhases, drawSlots, drawLayers];

/** Change the selection and redraw what depends on it. */
function select(change) {
  const old = { ...state };
  Object.assign(state, change);
  fitMicrobatch();
  const todo = new Set(Object.keys(state).filter((key) => state[key] !== old[key]).flatMap((key) => DRAW[key]));
  if (!todo.size) return;
  showControls();
  history.replaceState(null, "", "#" + new URLSearchParams({ layer: state.layer, mb: state.mb, view: state.view, time: state.time, map: state.map, hist: state.hist, scale: state.scale }));
  todo.forEach((draw) => later(draw));
}
/** The chosen microbatch must be one that the chosen layer has. */
function fitMicrobatch() {
  state.layer = Math.min(layers.length - 1, Math.max(0, state.layer));
  state.mb = nearest(unpack(layers[state.layer].microbatch).values, state.mb);
}
const waiting = new Set();
/** Draw before the next frame, once however often it is asked for; a slider moves faster than charts. */
function later(draw) {
  if (!waiting.size) requestAnimationFrame(() => { const now = [...waiting]; waiting.clear(); now.forEach((f) => f()); });
  waiting.add(draw);
}

function showControls() {
  const mbs = unpack(layers[state.layer].microbatch).values;
  $("layer").value = state.layer;
  $("mb").max = mbs.length - 1;
  $("mb").value = mbs.indexOf(state.mb);
  $("mb-label").textContent = `${whole(state.mb)} (of 0–${whole(layers[state.layer].seen - 1)})`;
  document.querySelectorAll(".switch").forEach((node) => node.querySelectorAll("button").forEach((button) => {
    button.setAttribute("aria-pressed", String(state[node.dataset.state] === button.dataset.value));
  }));
  document.querySelectorAll(".viewname").forEach((node) => { node.textContent = "· " + state.view; });
  document.querySelectorAll(".layername").forEach((node) => { node.textContent = "· " + called(state.layer); });
}
function stepMicrobatch(by) {
  const mbs = unpack(layers[state.layer].microbatch).values;
  select({ mb: mbs[Math.min(mbs.length - 1, Math.max(0, mbs.indexOf(state.mb) + by))] });
}
function bindControls() {
  layers.forEach((layer, l) => $("layer").append(Object.assign(element("option", layer.name), { value: l })));
  $("layer").addEventListener("change", () => select({ layer: Number($("layer").value) }));
  $("mb").addEventListener("input", () => select({ mb: unpack(layers[state.layer].microbatch).values[Number($("mb").value)] }));
  for (const [id, act] of [
    ["layer-prev", () => select({ layer: state.layer - 1 })], ["layer-next", () => select({ layer: state.layer + 1 })],
    ["mb-prev", () => stepMicrobatch(-1)], ["mb-next", () => stepMicrobatch(1)],
  ]) $(id).addEventListener("click", act);
  document.querySelectorAll(".switch").forEach((node) => node.querySelectorAll("button").forEach((button) => {
    button.addEventListener("click", () => select({ [node.dataset.state]: button.dataset.value }));
  }));
  document.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT"].includes(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      ArrowLeft: () => stepMicrobatch(-1), ArrowRight: () => stepMicrobatch(1), ArrowUp: () => select({ layer: state.layer - 1 }),
      ArrowDown: () => select({ layer: state.layer + 1 }), b: () => select({ view: state.view === "before" ? "after" : "before" }),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  window.addEventListener("hashchange", () => select(fromHash()));
}
/** The selection in the address; what does not fit is ignored. */
function fromHash() {
  const given = new URLSearchParams(location.hash.slice(1)), found = {};
  for (const key of ["layer", "mb"]) if (/^\d+$/.test(given.get(key) ?? "")) found[key] = Number(given.get(key));
  for (const [key, values] of Object.entries(CHOICES)) if (values.includes(given.get(key))) found[key] = given.get(key);
  return found;
}
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

function start() {
  const asked = new URLSearchParams(location.hash.slice(1)).get("theme");
  setTheme(["light", "dark"].includes(asked) ? asked : matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  drawHeader();
  drawRun();
  drawFooter();
  $("theme").addEventListener("click", () => {
    setTheme(dark() ? "light" : "dark");
    drawInTurn([drawRun, ...(layers.length ? ALL : [])]);
  });
  if (!layers.length) {
    $("loads").hidden = true;
    document.documentElement.dataset.ready = "yes";
    return;
  }
  const l = layers.reduce((best, layer, i) => (layer.summary.before_p50 > layers[best].summary.before_p50 ? i : best), 0);
  const before = Array.from(unpack(layers[l].records.before).values);
  state.layer = l;
  state.mb = unpack(layers[l].microbatch).values[before.indexOf(before.reduce((a, b) => Math.max(a, b), 0))];
  Object.assign(state, fromHash());
  fitMicrobatch();
  bindControls();
  showControls();
  drawInTurn(ALL);
}
/** One chart after the other, so that the page can be read and used while the rest is drawn. */
function drawInTurn(list) {
  if (!list.length) { document.documentElement.dataset.ready = "yes"; return; }
  list[0]();
  setTimeout(() => drawInTurn(list.slice(1)), 0);
}
start();
