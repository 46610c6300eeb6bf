// The numbers of the run as the charts want them: what came at first, thinned, and every row since.
const MOST_POINTS = 4000; // then neighbours are joined

export class Series {
  constructor() {
    this.every = 1;
    this.columns = { step: [] };
    this.validation = [];
  }

  begin(history) {
    this.every = history.every;
    this.columns = history.columns;
    this.validation = history.validation;
  }

  add(rows) {
    for (const [name, values] of Object.entries(rows.columns)) {
      (this.columns[name] ||= []).push(...values);
    }
    this.validation.push(...rows.validation);
    if (this.columns.step.length > MOST_POINTS) {
      this.halve();
    }
  }

  halve() {
    const steps = this.columns.step;
    const halved = {};
    for (const [name, values] of Object.entries(this.columns)) {
      halved[name] = [];
      for (let i = 0; i < steps.length; i += 2) {
        halved[name].push(name === "step" ? steps[Math.min(i + 1, steps.length - 1)] : mean(values[i], values[i + 1]));
      }
    }
    this.columns = halved;
    this.every *= 2;
  }

  // [step, value] of a column, without the rows that lack it.
  points(name) {
    const values = this.columns[name] || [];
    const found = [];
    for (let i = 0; i < values.length; i += 1) {
      if (values[i] !== null && values[i] !== undefined) {
        found.push([this.columns.step[i], values[i]]);
      }
    }
    return found;
  }

  // The smoothed loss at a step, and the validation loss of the last validation up to it.
  lossAt(step, weight) {
    const smooth = smoothed(this.points("loss"), weight);
    return lastUpTo(smooth, step);
  }

  validationAt(step) {
    const exact = this.validation.find(([at]) => at === step);
    return exact ? exact[1] : null;
  }
}

function mean(a, b) {
  const known = [a, b].filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function lastUpTo(points, step) {
  let found = null;
  for (const [at, value] of points) {
    if (at > step) {
      break;
    }
    found = value;
  }
  return found;
}

// An exponential average that counts the first points fully, as Adam's does.
export function smoothed(points, weight) {
  let average = 0;
  let total = 0;
  return points.map(([step, value]) => {
    average = weight * average + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return [step, average / total];
  });
}
