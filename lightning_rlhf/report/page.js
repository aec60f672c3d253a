"use strict";
// The numbers nearest to where one points in a figure.
const tip = document.getElementById("tip");
const short = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))).replace("-", "−") : value);
for (const figure of document.querySelectorAll("figure[data-dots]")) {
  const dots = JSON.parse(figure.dataset.dots);
  const svg = figure.querySelector("svg");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const away = ([left, top]) => Math.hypot(box.left + left * box.width - event.clientX, box.top + top * box.height - event.clientY);
    const near = dots.reduce((best, dot) => (away(dot) < away(best) ? dot : best), dots[0]);
    tip.hidden = !near || away(near) > 40;
    if (tip.hidden) return;
    const [left, top, label, x, y, low, high] = near;
    tip.textContent = `${label ? label + "\n" : ""}${short(x)}: ${short(y)}${low === null ? "" : ` (${short(low)} to ${short(high)})`}`;
    const at = box.left + left * box.width;
    tip.style.left = `${Math.max(4, Math.min(at + 10, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, box.top + top * box.height - tip.offsetHeight - 8)}px`;
  });
  svg.addEventListener("pointerleave", () => (tip.hidden = true));
}

// Search, filter and sort the pairs; their state is the address, so that a view can be sent to somebody.
const controls = document.getElementById("controls");
if (controls) {
  const list = document.getElementById("pairs");
  const pairs = [...list.children].map((node) => {
    const said = [...node.querySelectorAll(".text")].map((part) => part.textContent).join("\n");
    return { node, text: said.toLowerCase(), of: (name) => Number(node.dataset[name] ?? NaN) };
  });
  const boxes = [...controls.querySelectorAll("input[data-column]")];
  const orders = { gain: ["gain", -1], loss: ["gain", 1], high: ["score", -1], low: ["score", 1], long: ["length", -1], far: ["kl", -1] };
  const tests = { better: (pair) => pair.of("gain") > 0, worse: (pair) => pair.of("gain") < 0, cut: (pair) => pair.of("cut") > 0 };

  const show = () => {
    const words = controls.q.value.toLowerCase().split(/\s+/).filter(Boolean);
    const test = tests[controls.show.value] ?? (() => true);
    const kept = pairs.filter((pair) => test(pair) && words.every((word) => pair.text.includes(word)));
    const [key, sign] = orders[controls.sort.value] ?? ["place", 1];
    const place = (pair) => (Number.isNaN(pair.of(key)) ? Infinity : sign * pair.of(key));
    kept.sort((a, b) => (place(a) > place(b)) - (place(a) < place(b)));
    list.replaceChildren(...kept.map((pair) => pair.node));
    const hidden = boxes.filter((box) => !box.checked).map((box) => box.dataset.column);
    for (const pair of kept) {
      for (const side of pair.node.querySelectorAll(".side")) side.hidden = hidden.includes(side.dataset.column);
    }
    document.getElementById("count").textContent = `${kept.length} of ${pairs.length}`;
    return hidden;
  };

  const write = () => {
    const hidden = show();
    const state = { q: controls.q.value, show: controls.show.value, sort: controls.sort.value, hide: hidden.join(".") };
    const kept = Object.entries(state).filter(([, value]) => value);
    history.replaceState(null, "", "#" + new URLSearchParams(kept));
  };

  const read = () => {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const name of ["q", "show", "sort"]) controls[name].value = state.get(name) ?? "";
    for (const name of ["show", "sort"]) if (controls[name].selectedIndex < 0) controls[name].value = "";
    const hidden = (state.get("hide") ?? "").split(".");
    for (const box of boxes) box.checked = !hidden.includes(box.dataset.column);
    show();
  };

  controls.hidden = false;
  controls.addEventListener("input", write);
  controls.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", read);
  read();
}
