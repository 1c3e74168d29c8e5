// Row 0 of `rows` is the mean over layers, row l + 1 is that of `names[l]`, in tenths of a percent.
const slider = document.getElementById("layer"), spans = document.querySelectorAll("#text span");
function show() {
  const row = rows[slider.value], single = slider.value > 0;
  const [low, high] = single ? [floor, 1000] : scale;
  const name = single ? "layer " + names[slider.value - 1] : "all layers";
  slider.setAttribute("aria-valuetext", name);
  document.getElementById("name").value = name;
  document.getElementById("low").textContent = (single ? "" : "≤ ") + Math.round(low / 10) + "%";
  document.getElementById("high").textContent = (single ? "" : "≥ ") + Math.round(high / 10) + "%";
  spans.forEach((span, i) => {
    span.style.setProperty("--share", high > low ? Math.min(1, Math.max(0, (row[i] - low) / (high - low))) : 1);
    span.title = single ? row[i] / 10 + "% of the MLP width in " + name : titles[i];
  });
}
const titles = Array.from(spans, span => span.title);
slider.addEventListener("input", show);
show();
