"use strict";
// One mark for a question and a passage, on whichever side and page it stands: "yes", "no", or none.
const kept = new Map();
const keyOf = result => `mark\t${result.dataset.question}\t${result.dataset.passage}`;
const read = key => {
  try { return localStorage.getItem(key); } catch { return kept.get(key) ?? null; }
};
const write = (key, mark) => {
  try {
    if (mark) localStorage.setItem(key, mark); else localStorage.removeItem(key);
  } catch { kept.set(key, mark); }
};
const results = [...document.querySelectorAll("li[data-question]")];
const lines = document.getElementById("lines");

function show() {
  const wanted = new Set();
  const tally = [[0, 0], [0, 0]];
  for (const result of results) {
    const mark = read(keyOf(result));
    result.classList.toggle("yes", mark === "yes");
    result.classList.toggle("no", mark === "no");
    for (const button of result.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(button.value === mark));
    if (mark) tally[result.dataset.side][1] += 1;
    if (mark === "yes") {
      tally[result.dataset.side][0] += 1;
      const fields = [result.dataset.question, result.dataset.passage];
      wanted.add(fields.map(text => text.split(/\s+/).join(" ").trim()).join("\t"));
    }
  }
  lines.value = ["question\tpassage", ...wanted].join("\n") + "\n";
  const [left, right] = tally.map(([yes, all]) => `${yes} of ${all}`);
  if (tally[0][1] + tally[1][1])
    document.getElementById("tally").textContent = `Marked relevant: left ${left}, right ${right}.`;
}

for (const result of results)
  for (const button of result.querySelectorAll("button"))
    button.addEventListener("click", () => {
      write(keyOf(result), read(keyOf(result)) === button.value ? null : button.value);
      show();
    });
document.getElementById("download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.value], {type: "text/tab-separated-values"}));
  link.download = "questions.tsv";
  link.click();
  URL.revokeObjectURL(link.href);
});
show();
