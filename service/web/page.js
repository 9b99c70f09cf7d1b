// The page's parts, each in a file of its own, and what they begin with.

import "./uploads.js";
import { loadCohort } from "./cohort.js";
import { loadJobs } from "./jobs.js";
import { readAddress } from "./viewer.js";

loadCohort();
loadJobs();
readAddress();
