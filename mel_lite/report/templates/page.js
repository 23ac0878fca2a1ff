"use strict";
(() => {
  const tools = document.querySelector(".tools");
  if (!tools) return;
  const search = document.getElementById("search");
  const count = document.getElementById("count");
  const boxes = [...tools.querySelectorAll("input[type=checkbox]")];
  const lessons = [...document.querySelectorAll(".lesson")].map((element) => ({
    element,
    status: element.dataset.status,
    text: element.textContent.toLowerCase(),
  }));
  function update() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let shown = 0;
    for (const lesson of lessons) {
      const hit = wanted.has(lesson.status) && words.every((word) => lesson.text.includes(word));
      lesson.element.hidden = !hit;
      shown += hit;
    }
    count.textContent = `${shown} of ${lessons.length} shown`;
  }
  search.addEventListener("input", update);
  boxes.forEach((box) => box.addEventListener("change", update));
  tools.hidden = false;
  update();
})();
