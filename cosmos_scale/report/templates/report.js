// The page works without this: it adds the choice of the axis and of runs, and a cursor that tells values.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  let axis = "steps";
  const hidden = new Set();

  // Over this axis, or over steps where a picture does not have it.
  const axisOf = (name) => (page.plots[name] && page.plots[name].axes[axis] ? axis : "steps");

  function showAxis() {
    for (const plot of document.querySelectorAll(".plot[data-name]")) {
      const wanted = axisOf(plot.dataset.name);
      for (const one of plot.querySelectorAll("[data-axis]")) one.hidden = one.dataset.axis !== wanted;
      leave(plot);
    }
  }

  function showRuns() {
    const style = document.getElementById("hidden-runs");
    const rules = [...hidden].map((run) => `.plot [id*="-run${run}-"]`);
    style.textContent = rules.length ? `${rules.join(", ")} { display: none; }` : "";
    document.querySelectorAll(".plot[data-name]").forEach(leave);
    for (const one of document.querySelectorAll("[data-of]")) {
      one.hidden = one.dataset.of.split(" ").every((run) => hidden.has(Number(run)));
    }
  }

  function xOf(curve, place, over) {
    if (over === "hours") return curve.hours[place];
    return over === "samples" ? curve.steps[place] * page.batches[curve.run] : curve.steps[place];
  }

  // The place of the point that is nearest to x; points ascend.
  function nearest(curve, x, over) {
    let low = 0, high = curve.steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xOf(curve, middle, over) <= x) low = middle; else high = middle;
    }
    return Math.abs(xOf(curve, high, over) - x) < Math.abs(xOf(curve, low, over) - x) ? high : low;
  }

  const usable = (curve, over) =>
    !hidden.has(curve.run) && curve.steps.length && (over !== "samples" || page.batches[curve.run]) &&
    (over !== "hours" || curve.hours[0] !== null);

  const shown = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(3)
    : value.toLocaleString("en", { maximumSignificantDigits: 5 }));

  function leave(plot) {
    plot.querySelectorAll(".cursor").forEach((line) => line.remove());
    const tip = plot.querySelector(".tip");
    tip.hidden = true;
    delete plot.dataset.x;
  }

  function point(plot, x) {
    const data = page.plots[plot.dataset.name], over = axisOf(plot.dataset.name);
    const curves = data.curves.filter((curve) => usable(curve, over));
    if (!curves.length) return leave(plot);
    const places = curves.map((curve) => nearest(curve, x, over));
    const at = curves.map((curve, one) => xOf(curve, places[one], over));
    const best = at.reduce((found, one) => (Math.abs(one - x) < Math.abs(found - x) ? one : found));
    const { left, right, top, bottom, x: [first, last] } = data.axes[over];
    const place = left + ((best - first) / (last - first)) * (right - left);
    const svg = plot.querySelector(`[data-axis="${over}"] svg`);
    svg.querySelectorAll(".cursor").forEach((line) => line.remove());
    const line = document.createElementNS(SVG, "line");
    line.setAttribute("class", "cursor");
    for (const [name, value] of Object.entries({ x1: place, x2: place, y1: top, y2: bottom })) line.setAttribute(name, value);
    svg.append(line);
    const tip = plot.querySelector(".tip");
    tip.replaceChildren();
    const head = document.createElement("div");
    head.textContent = `${over === "hours" ? "hour" : over === "samples" ? "sample" : "step"} ${shown(best)}`;
    tip.append(head);
    curves.forEach((curve, one) => {
      const row = document.createElement("div"), swatch = document.createElement("span"), text = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.setProperty("--colour", `var(--run-${curve.run % 8})`);
      const name = page.runs.length > 1 ? `${page.runs[curve.run]}, ${curve.label}` : curve.label;
      text.textContent = `${name}: ${shown(curve.values[places[one]])}${data.unit ? ` ${data.unit}` : ""}`;
      row.append(swatch, text);
      tip.append(row);
    });
    tip.hidden = false;
    const share = place / svg.viewBox.baseVal.width;
    tip.style.left = share < 0.5 ? `calc(${100 * share}% + 10px)` : "";
    tip.style.right = share < 0.5 ? "" : `calc(${100 - 100 * share}% + 10px)`;
    plot.dataset.x = best;
  }

  function pointed(plot, event) {
    const over = axisOf(plot.dataset.name), svg = plot.querySelector(`[data-axis="${over}"] svg`);
    const box = svg.getBoundingClientRect(), area = page.plots[plot.dataset.name].axes[over];
    const place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const share = Math.min(1, Math.max(0, (place - area.left) / (area.right - area.left)));
    point(plot, area.x[0] + share * (area.x[1] - area.x[0]));
  }

  function keyed(plot, event) {
    const over = axisOf(plot.dataset.name);
    const curve = page.plots[plot.dataset.name].curves.find((one) => usable(one, over));
    if (event.key === "Escape") return leave(plot);
    if (!curve || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const end = curve.steps.length - 1;
    let place = plot.dataset.x === undefined ? -1 : nearest(curve, Number(plot.dataset.x), over);
    if (event.key === "ArrowRight") place += 1; else if (event.key === "ArrowLeft") place -= 1;
    if (event.key === "Home") place = 0;
    if (event.key === "End") place = end;
    point(plot, xOf(curve, Math.min(end, Math.max(0, place)), over));
  }

  for (const plot of document.querySelectorAll(".plot[data-name]")) {
    plot.addEventListener("pointermove", (event) => pointed(plot, event));
    plot.addEventListener("pointerdown", (event) => pointed(plot, event));
    plot.addEventListener("pointerleave", () => leave(plot));
    plot.addEventListener("keydown", (event) => keyed(plot, event));
    plot.addEventListener("blur", () => leave(plot));
  }
  for (const choice of document.querySelectorAll("input[name=axis]")) {
    choice.addEventListener("change", () => { axis = choice.value; showAxis(); });
  }
  for (const choice of document.querySelectorAll("input[data-run]")) {
    choice.addEventListener("change", () => {
      if (choice.checked) hidden.delete(Number(choice.dataset.run)); else hidden.add(Number(choice.dataset.run));
      showRuns();
    });
  }
  document.querySelectorAll(".controls").forEach((one) => { one.hidden = false; });
})();
