// Makes the report's large charts interactive: zoom, choice of the fit, values under the pointer.
// Without it the page shows the same charts, static.
"use strict";
(() => {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = event.message; });
  root.classList.add("js");

  const THIN = "\u202f";
  const FACTORS = [20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01];
  const FEWEST = 12; // points in the narrowest range
  const HINT = "Drag over the chart to zoom; double-click, or “whole range”, to go back.";

  function written(value, digits, sign = false) {
    const [whole, rest] = Math.abs(value).toFixed(digits).split(".");
    const text = whole.replace(/\B(?=(\d{3})+$)/g, THIN) + (rest ? "." + rest : "");
    return (value < 0 ? "−" : sign ? "+" : "") + text;
  }

  // About `count` round values in a range, and their labels.
  function ticks(low, high, count) {
    const rough = (high - low) / Math.max(count, 1);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const list = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) {
      list.push([k * step, written(k * step, digits)]);
    }
    return list;
  }

  // The first index whose value, of ascending ones, is not below the target.
  const position = (values, target) => values.filter((value) => value < target).length;

  const px = (value) => value.toFixed(1);

  const text = (at, height, words, anchor = "middle", kind = "") =>
    `<text class="${kind}" x="${px(at)}" y="${px(height)}" text-anchor="${anchor}">${words}</text>`;

  // Those of a list that are at least some pixels away from all before them.
  function apart(list, pixel, distance) {
    const taken = [];
    return list.filter((entry) => {
      const free = taken.every((place) => Math.abs(place - pixel(entry)) >= distance);
      if (free) taken.push(pixel(entry));
      return free;
    });
  }

  class Chart {
    constructor(figure, number) {
      this.figure = figure;
      this.svg = figure.querySelector("svg.plot");
      this.readout = figure.querySelector(".readout");
      this.data = JSON.parse(figure.querySelector("script").textContent);
      this.clip = "clip-" + number;
      this.last = this.data.tof.length - 1;
      this.whole = [this.data.tof[0], this.data.tof[this.last]];
      this.range = this.whole;
      this.fit = 0;
      this.root = false;
      for (const fit of this.data.fits) this.complete(fit);
      figure.querySelector(".tools").hidden = false;
      this.listen();
      this.readout.textContent = HINT;
    }

    // The background comes thinned out; the difference not at all.
    complete(fit) {
      const { measured, every } = this.data;
      const thinned = fit.background;
      fit.background = measured.map((_, i) => {
        const k = Math.floor(i / every), left = thinned[k], right = thinned[k + 1] ?? left;
        return left === null || right === null ? null : left + (right - left) * (i / every - k);
      });
      fit.difference = measured.map((y, i) =>
        y === null || fit.calculated[i] === null ? null : y - fit.calculated[i]);
    }

    // d-spacing of a time of flight, by Newton's method; the inverse is exact.
    tofOf(d) {
      const [difc, difa, difb, zero] = this.data.calibration;
      return difc * d + difa * d * d + difb / d + zero;
    }

    spacingOf(tof) {
      const [difc, difa, difb, zero] = this.data.calibration;
      let d = (tof - zero) / difc;
      for (let n = 0; n < 20; n++) {
        d -= (this.tofOf(d) - tof) / (difc + 2 * difa * d - difb / (d * d));
      }
      return d;
    }

    show(low, high) {
      const { tof } = this.data;
      const least = (FEWEST * (this.whole[1] - this.whole[0])) / this.last;
      let width = Math.min(Math.max(high - low, least), this.whole[1] - this.whole[0]);
      const start = Math.min(Math.max((low + high - width) / 2, tof[0]), this.whole[1] - width);
      this.range = [start, start + width];
      this.draw();
    }

    act(name) {
      const [low, high] = this.range, half = (high - low) / 2;
      const ranges = {
        in: [low + half / 2, high - half / 2], out: [low - half, high + half],
        left: [low - half, high - half], right: [low + half, high + half], all: this.whole,
      };
      if (name in ranges) this.show(...ranges[name]);
      else {
        this.root = !this.root;
        this.figure.querySelector("[data-act=root]").setAttribute("aria-pressed", this.root);
        this.draw();
      }
    }

    listen() {
      const { figure, svg } = this;
      for (const button of figure.querySelectorAll("[data-act]")) {
        button.addEventListener("click", () => this.act(button.dataset.act));
      }
      for (const choice of figure.querySelectorAll("input[type=radio]")) {
        choice.addEventListener("change", () => {
          this.fit = Number(choice.value);
          for (const element of [svg, figure]) {
            element.classList.forEach((c) => c.startsWith("of-") && element.classList.remove(c));
            element.classList.add("of-" + choice.dataset.system);
          }
          this.draw();
        });
      }
      for (const button of figure.closest("article").querySelectorAll(".go")) {
        button.addEventListener("click", () => {
          const at = this.data.places[button.dataset.place];
          const reach = 12 * Number(button.dataset.width);
          this.show(at - reach, at + reach);
          figure.scrollIntoView({ block: "nearest", behavior: "smooth" });
        });
      }
      svg.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        svg.setPointerCapture(event.pointerId);
        this.start = this.timeAt(event);
      });
      svg.addEventListener("pointermove", (event) => this.point(this.timeAt(event)));
      svg.addEventListener("pointerup", (event) => {
        const { start } = this, end = this.timeAt(event);
        this.start = undefined;
        if (start === undefined) return;
        if (Math.abs(this.x(end) - this.x(start)) < 6) this.point(end);
        else this.show(Math.min(start, end), Math.max(start, end));
      });
      svg.addEventListener("pointercancel", () => { this.start = undefined; this.draw(); });
      svg.addEventListener("pointerleave", () => {
        if (this.start !== undefined) return;
        this.showMarks("");
        this.readout.textContent = HINT;
      });
      svg.addEventListener("dblclick", () => this.act("all"));
    }

    timeAt(event) {
      const box = this.svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width * this.width - this.left) /
        (this.right - this.left);
      const [low, high] = this.range;
      return low + Math.min(Math.max(share, 0), 1) * (high - low);
    }

    showMarks(marks) {
      const layer = this.svg.querySelector(".marks");
      if (layer) layer.innerHTML = marks;
    }

    box(kind, from, to) {
      return `<rect class="${kind}" x="${from}" y="${this.top}" width="${to - from}"` +
        ` height="${this.bottom - this.top}"/>`;
    }

    // Show the values at a time of flight, or what is being selected.
    point(time) {
      const at = px(this.x(time)), { top, bottom } = this;
      let marks = `<path class="cursor" d="M${at} ${top}V${bottom}"/>`;
      if (this.start !== undefined) {
        const from = this.x(this.start);
        marks = this.box("selection", Math.min(at, from), Math.max(at, from));
      }
      this.showMarks(marks);
      const { tof, measured, sigma } = this.data, fit = this.data.fits[this.fit];
      let i = Math.min(position(tof, time), this.last);
      if (i && time - tof[i - 1] < tof[i] - time) i--;
      const d = written(this.spacingOf(tof[i]), 4);
      const parts = [`${written(tof[i], 1)}${THIN}µs`, `d ${d}${THIN}Å`];
      if (measured[i] === null) parts.push("not measured");
      else {
        parts.push(`measured ${this.value(measured[i])}`);
        if (fit && fit.difference[i] !== null) {
          parts.push(`calculated ${this.value(fit.calculated[i])}`);
          const sigmas = written(fit.difference[i] / sigma[i], 1, true);
          if (sigma[i]) parts.push(`difference ${sigmas}${THIN}σ`);
        }
      }
      const near = fit ? this.reflections(fit, time) : "";
      if (near) parts.push(`reflection ${near}`);
      this.readout.textContent = parts.join("  ·  ");
    }

    value(number) {
      return written(number, Math.max(0, 2 - Math.floor(Math.log10(Math.abs(number) || 1))));
    }

    // Those within a few pixels.
    reflections(fit, time) {
      const reach = 5 * (this.range[1] - this.range[0]) / (this.right - this.left);
      const first = position(fit.tof, time - reach), end = position(fit.tof, time + reach);
      const some = fit.hkl.slice(first, Math.min(end, first + 3)).join(", ");
      return end > first + 3 ? `${some} and ${end - first - 3} more` : some;
    }

    draw() {
      const { svg, data } = this, { tof, measured } = data, fit = data.fits[this.fit];
      const width = Math.max(svg.parentNode.clientWidth, 240), narrow = width < 600;
      const height = narrow ? 430 : 536, top = 44, bottom = height - 44;
      const left = narrow ? 44 : 66, right = width - (narrow ? 6 : 12);
      const lower = bottom - (narrow ? 84 : 104), main = lower - 52;
      const [low, high] = this.range;
      const first = Math.max(position(tof, low) - 1, 0);
      const end = Math.min(position(tof, high) + 1, this.last + 1);
      const indices = [...tof.keys()].slice(first, end);
      const x = (time) => left + (time - low) / (high - low) * (right - left);
      Object.assign(this, { width, left, right, top, bottom, x });

      const seen = (values) => values.slice(first, end).filter((v) => v !== null);
      const values = [...seen(measured), ...(fit ? seen(fit.calculated) : [])];
      const bend = this.root ? (v) => Math.sign(v) * Math.sqrt(Math.abs(v)) : (v) => v;
      const unbend = this.root ? (v) => Math.sign(v) * v * v : (v) => v;
      let [least, most] = values.length ?
        [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))] : [0, 1];
      if (!(most > least)) most = least + 1;
      const room = 0.04 * (bend(most) - bend(least));
      const from = bend(least) - room, to = bend(most) + room;
      const y = (v) => main - (bend(v) - from) / (to - from) * (main - top);

      const curve = (kind, scale, list) => {
        const begins = (i) => i === first || list[i - 1] === null;
        const point = (i) => `${begins(i) ? "M" : "L"}${px(x(tof[i]))} ${px(scale(list[i]))}`;
        const points = indices.filter((i) => list[i] !== null).map(point);
        return `<path class="${kind}" d="${points.join("")}"/>`;
      };
      const rung = (at, words) =>
        `<path class="grid" d="M${left} ${px(at)}H${right}"/>` +
        text(left - 7, at + 4, words, "end");
      const tick = (at, edge, length, words, height_) =>
        `<path class="axis" d="M${px(at)} ${edge}v${length}"/>` + text(at, height_, words);

      let art = `<clipPath id="${this.clip}">${this.box("", left, right)}</clipPath>`;
      for (let i = first; i < end; i++) {
        if (measured[i] !== null) continue;
        const begin = Math.max(x(tof[i]), left);
        while (i < end && measured[i] === null) i++;
        const stop = Math.min(x(tof[Math.min(i, this.last)]), right);
        if (stop > begin) art += this.box("gap", begin, stop);
      }
      let marks = ticks(unbend(from), unbend(to), narrow ? 4 : 5);
      if (this.root) { // small values have more room
        const finer = ticks(unbend(from), unbend(to), 25), last = finer.at(-1);
        marks = [...marks, ...finer.filter(([v]) => v > 0 && v < last[0] / 4)];
      }
      for (const [v, words] of apart(marks, ([value]) => y(value), 20)) art += rung(y(v), words);
      for (const [t, words] of ticks(low, high, (right - left) / (narrow ? 64 : 110))) {
        art += tick(x(t), bottom, 5, words, bottom + 20);
      }
      const spacings = [this.spacingOf(low), this.spacingOf(high)];
      for (const [d, words] of ticks(...spacings, (right - left) / (narrow ? 56 : 100))) {
        art += tick(x(this.tofOf(d)), top, -5, words, top - 11);
      }
      art += text(right, height - 5, "time of flight / µs", "end") +
        text(right, 14, '<tspan class="symbol">d</tspan> / Å', "end") +
        text(narrow ? 2 : left, 14, `intensity per µs${this.root ? ", √ scale" : ""}`, "start");

      const dots = indices.filter((i) => measured[i] !== null).map((i) =>
        `M${px(x(tof[i]))} ${px(y(measured[i]))}h0`);
      const dot = Math.min(Math.max(1.2 * Math.sqrt((right - left) / (end - first)), 2.2), 6);
      let lines = `<path class="measured" style="stroke-width: ${px(dot)}" d="${dots.join("")}"/>`;
      if (fit) {
        const reach = (most - least) * 1.08 * (bottom - lower) / (main - top) / 2;
        const largest = seen(fit.difference).reduce((a, b) => Math.max(a, Math.abs(b)), 0);
        const factor = FACTORS.find((f) => largest * f <= reach) ?? FACTORS.at(-1);
        const shown = reach / factor;
        const below = (v) => (lower + bottom) / 2 - v / shown * (bottom - lower) / 2;
        for (const [v, words] of ticks(-shown, shown, 4)) art += rung(below(v), words);
        lines += curve("background", y, fit.background) + curve("calculated", y, fit.calculated) +
          curve("difference", below, fit.difference);
        const by = factor > 1 ? `×${THIN}${factor}` : `÷${THIN}${Math.round(1 / factor)}`;
        art += `<path class="axis" d="M${left} ${lower}H${right}V${bottom}H${left}Z"/>` +
          text(left + 6, lower + 14, `difference${factor === 1 ? "" : `, ${by}`}`, "start") +
          this.ticksOf(fit, main);
        if (this.fit === 0) art += this.placesAt(lower - 11);
      }
      art += `<path class="axis" d="M${left} ${top}H${right}V${main}H${left}Z"/>`;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.innerHTML = art + `<g clip-path="url(#${this.clip})">${lines}</g><g class="marks"></g>`;
    }

    // A line for each reflection; its indices where there is room.
    ticksOf(fit, main) {
      const [first, end] = this.range.map((time) => position(fit.tof, time));
      const places = fit.tof.slice(first, end).map((time, k) => [this.x(time), fit.hkl[first + k]]);
      const path = places.map(([at]) => `M${px(at)} ${main + 5}v10`).join("");
      const roomy = (this.right - this.left) / Math.max(end - first, 1) > 24;
      const words = roomy ? apart(places, ([at]) => at, 36) : [];
      return `<path class="reflections" d="${path}"/>` +
        words.map(([at, hkl]) => text(at, main + 27, hkl, "middle", "index miller")).join("");
    }

    // The worst misfits, by their numbers in the table; the worse ones first.
    placesAt(height) {
      const [low, high] = this.range;
      const places = [...this.data.places.entries()];
      const inside = places.filter(([, time]) => time >= low && time <= high);
      return apart(inside, ([, time]) => this.x(time), 18).map(([k, time]) =>
        `<g class="place"><circle cx="${px(this.x(time))}" cy="${height}" r="8.5"/>` +
        text(this.x(time), height + 4, k + 1) + "</g>").join("");
    }
  }

  const charts = [...document.querySelectorAll("article figure.chart")].map((f, k) => new Chart(f, k));
  const drawAll = () => {
    for (const chart of charts) chart.draw();
    // For tests of the page: it is ready, and nothing is wider than the window.
    root.dataset.width = root.clientWidth;
    root.dataset.scrollWidth = root.scrollWidth;
  };
  drawAll();
  root.dataset.ready = charts.length;
  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawAll);
  });
})();
