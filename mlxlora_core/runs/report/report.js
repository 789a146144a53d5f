"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const height = { loss: 320, lengths: 240 };
  const many = 150; // reports above which the line is smoothed

  const steps = {
    label: null, // the caption says it
    domain: [0, Math.max(figures.steps, ...figures.train.map((d) => d.step), ...figures.valid.map((d) => d.step))],
  };
  const frame = () => Plot.ruleY([0], { stroke: "currentColor", strokeOpacity: 0.5 });

  /** A line of one series; of many points, themselves in the background and their mean over it. */
  function line(rows, y, stroke, options = {}) {
    const shown = rows.filter((d) => d[y] !== undefined);
    if (shown.length < 2) return [Plot.dot(shown, { x: "step", y, fill: stroke, r: 3 })];
    const style = { x: "step", y, stroke, strokeWidth: 2, ...options };
    if (shown.length <= many) return [Plot.lineY(shown, style)];
    const k = Math.ceil(shown.length / 50);
    return [
      Plot.lineY(shown, { ...style, strokeWidth: 1, strokeOpacity: 0.3 }),
      Plot.lineY(shown, Plot.windowY({ k, anchor: "middle" }, style)),
    ];
  }

  function tip(rows, y, format) {
    const shown = rows.filter((d) => d[y] !== undefined);
    return Plot.tip(shown, Plot.pointerX({ x: "step", y, title: (d) => `step ${d.step}\n${format(d[y])}` }));
  }

  const decimals = (digits) => (value) => value.toFixed(digits);
  const overSteps = (y, stroke, format, options) => ({
    x: { ...steps, ticks: 4 },
    y: { label: null, ticks: 3, grid: true, zero: true, nice: true, ...options },
    marks: [frame(), ...line(figures.train, y, stroke), tip(figures.train, y, format)],
  });

  const charts = {
    loss() {
      const tests = figures.ends
        .filter((end) => end.split === "test")
        .map((end) => ("before" in end ? { step: 0, loss: end.before } : { step: figures.steps, loss: end.after }));
      const green = "var(--green)";
      return {
        x: steps,
        y: { label: null, grid: true, zero: true, nice: true },
        marks: [
          frame(),
          ...line(figures.train, "loss", "var(--blue)"),
          ...line(figures.valid, "loss", "var(--orange)", { strokeDasharray: "6 4" }),
          Plot.dot(figures.valid, { x: "step", y: "loss", fill: "var(--orange)", r: 3.5 }),
          Plot.dot(tests, { x: "step", y: "loss", fill: green, symbol: "diamond", r: 6 }),
          ...tests.map((test) =>
            Plot.text([test], {
              x: "step", y: "loss", text: (d) => d.loss.toFixed(2), fill: green, fontWeight: 600,
              ...(test.step === 0 ? { textAnchor: "start", dx: 9, dy: -9 } : { textAnchor: "end", dx: 6, dy: -14 }),
            }),
          ),
          tip([...figures.train, ...figures.valid], "loss", decimals(4)),
        ],
      };
    },
    rate() {
      const drawn = overSteps("learning_rate", "var(--purple)", (v) => v.toExponential(2), {
        tickFormat: (v) => (v === 0 ? "0" : d3.format(".1~e")(v)),
      });
      const end = figures.warmup ? [figures.warmup] : [];
      return {
        ...drawn,
        marks: [
          ...drawn.marks,
          Plot.ruleX(end, { stroke: "currentColor", strokeOpacity: 0.6, strokeDasharray: "4 3" }),
          Plot.text(end, { x: (d) => d, frameAnchor: "top", text: () => "warm-up", textAnchor: "start", dx: 5, dy: -16 }),
        ],
      };
    },
    norm: () => overSteps("grad_norm", "var(--green)", (v) => v.toPrecision(3)),
    speed: () => overSteps("tokens_per_second", "var(--blue)", (v) => `${Math.round(v)} tokens/s`, { tickFormat: "~s" }),
    memory() {
      const rows = figures.train.map((d) => ({ step: d.step, gb: d.peak_memory_bytes / 1e9 }));
      const drawn = overSteps("gb", "var(--orange)", (v) => `${v.toFixed(2)} GB`);
      return { ...drawn, marks: [frame(), ...line(rows, "gb", "var(--orange)"), tip(rows, "gb", (v) => `${v.toFixed(2)} GB`)] };
    },
    lengths() {
      const { bin_tokens: width, rows, longest } = figures.lengths;
      const bins = rows.map((count, i) => ({ from: i * width, to: (i + 1) * width, count }));
      const cut = figures.limit < longest;
      return {
        x: { label: "tokens" },
        y: { label: "rows", grid: true, nice: true },
        marks: [
          Plot.rectY(bins, {
            x1: "from", x2: "to", y: "count", inset: 0.5,
            fill: (d) => (cut && d.from >= figures.limit ? "var(--orange)" : "var(--blue)"),
          }),
          frame(),
          cut ? Plot.ruleX([figures.limit], { stroke: "var(--orange)", strokeWidth: 1.5, strokeDasharray: "4 3" }) : null,
          cut
            ? Plot.text([figures.limit], {
                x: (d) => d, frameAnchor: "top", text: () => `cut at ${figures.limit}`, fill: "var(--orange)",
                textAnchor: figures.limit > longest / 2 ? "end" : "start", dx: figures.limit > longest / 2 ? -6 : 6, dy: 2,
              })
            : null,
          Plot.tip(bins, Plot.pointerX({
            x1: "from", x2: "to", y: "count", title: (d) => `${d.from} to ${d.to - 1} tokens\n${d.count} rows`,
          })),
        ],
      };
    },
  };

  function draw(place) {
    const width = Math.floor(place.clientWidth);
    if (!width || place.dataset.width === String(width)) return;
    place.dataset.width = width;
    const name = place.dataset.chart;
    const label = place.closest("figure").querySelector("figcaption").textContent;
    const svg = Plot.plot({
      width,
      height: height[name] ?? 180,
      marginLeft: 44,
      marginTop: 22,
      marginRight: 20,
      marginBottom: name === "lengths" ? 40 : 28,
      style: { fontSize: "12px", background: "none", color: "inherit" },
      ariaLabel: label,
      ...charts[name](),
    });
    svg.setAttribute("role", "img");
    place.replaceChildren(svg);
  }

  const watcher = new ResizeObserver((entries) => entries.forEach((entry) => draw(entry.target)));
  document.querySelectorAll("[data-chart]").forEach((place) => {
    draw(place);
    watcher.observe(place);
  });
})();
