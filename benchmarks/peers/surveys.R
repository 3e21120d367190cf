# What do R's packages make of surveys? Rscript surveys.R FOLDER KS STARTS
#
# Writes the surveys that psychotools and psychotree bring into FOLDER as CSV (person, first, second, winner, covariates), then
# fits every CSV there: Bradley-Terry by psychotools::btmodel, mixtures of it for K in KS (1,2,...) by flexmix, with STARTS
# starts each, and with covariates of the weights where the file names them. Ties are left out. A line a fit in FOLDER/r.txt.

given <- commandArgs(trailingOnly = TRUE)
folder <- given[1]
ks <- as.integer(strsplit(given[2], ",")[[1]])
starts <- as.integer(given[3])
has <- function(name) suppressWarnings(suppressMessages(require(name, character.only = TRUE, quietly = TRUE)))
out <- file.path(folder, "r.txt")
say <- function(...) cat(..., "\n", sep = "\t", file = out, append = TRUE)
for (name in c("psychotools", "psychotree", "flexmix"))
  say("package", name, if (has(name)) as.character(packageVersion(name)) else "not installed")

export <- function(name, comparisons, known) {
  choice <- as.matrix(comparisons)  # 1: the first of the pair, -1: the second, 0: a tie, NA: not asked
  pair <- do.call(rbind, strsplit(colnames(choice), ":", fixed = TRUE))
  rows <- data.frame(person = rep(seq_len(nrow(choice)), ncol(choice)),
                     first = rep(pair[, 1], each = nrow(choice)), second = rep(pair[, 2], each = nrow(choice)))
  value <- as.vector(choice)
  rows$winner <- ifelse(value > 0, rows$first, ifelse(value < 0, rows$second, "tie"))
  for (column in names(known)) rows[[column]] <- rep(known[[column]], ncol(choice))
  rows <- rows[!is.na(value) & complete.cases(rows), ]
  write.csv(rows[order(rows$person), ], file.path(folder, paste0(name, ".csv")), row.names = FALSE, quote = FALSE)
}
if (has("psychotools")) {
  data("GermanParties2009", package = "psychotools")
  known <- GermanParties2009[c("gender", "education", "age", "crisis")]
  known$education <- paste0("e", known$education)
  export("GermanParties2009", GermanParties2009$preference, known)
  data("FirstNames", package = "psychotools")
  export("FirstNames", FirstNames$preference, NULL)
}
if (has("psychotree")) {
  data("CEMSChoice", package = "psychotree")
  export("CEMSChoice", CEMSChoice$preference, NULL)
  data("Topmodel2007", package = "psychotree")
  export("Topmodel2007", Topmodel2007$preference, Topmodel2007[c("gender", "age")])
}

for (path in sort(list.files(folder, "\\.csv$", full.names = TRUE))) {
  name <- sub("\\.csv$", "", basename(path))
  rows <- read.csv(path)
  rows <- rows[rows$winner != "tie", ]
  known <- setdiff(names(rows), c("person", "first", "second", "winner"))
  items <- sort(unique(c(rows$first, rows$second)))
  x <- outer(rows$first, items, "==") - outer(rows$second, items, "==")
  rows$won <- as.integer(rows$winner == rows$first)
  rows$lost <- 1L - rows$won
  for (i in seq_along(items)[-1]) rows[[paste0("x", i)]] <- x[, i]
  model <- paste("cbind(won, lost) ~ 0 +", paste0("x", seq_along(items)[-1], collapse = " + "))
  glm1 <- glm(as.formula(model), family = binomial(), data = rows, epsilon = 1e-12)
  say("fit", name, "glm", "weights", 1, sprintf("%.6f", as.numeric(logLik(glm1))), "")
  if (!has("flexmix")) next
  for (gate in c("weights", if (length(known)) "covariates")) for (k in ks) {
    if (gate == "covariates" && k == 1) next
    prior <- if (gate == "weights") FLXPconstant() else
      FLXPmultinom(as.formula(paste("~", paste(known, collapse = " + "))))
    set.seed(1)
    began <- proc.time()[["elapsed"]]
    best <- -Inf
    for (start in seq_len(if (k == 1) 1 else starts)) {
      fit <- try(flexmix(as.formula(paste(model, "| person")), data = rows, k = k,
                         model = FLXMRglm(family = "binomial"), concomitant = prior,
                         control = list(iter.max = 2000, tolerance = 1e-10, minprior = 0)), silent = TRUE)
      if (!inherits(fit, "try-error")) best <- max(best, as.numeric(logLik(fit)))
    }
    say("fit", name, "flexmix", gate, k, sprintf("%.6f", best), round(proc.time()[["elapsed"]] - began, 1))
  }
}
if (has("psychotools")) for (name in c("GermanParties2009", "FirstNames", "CEMSChoice", "Topmodel2007")) {
  if (!exists(name)) next
  preference <- get(name)$preference
  say("fit", name, "btmodel", "weights", 1,
      sprintf("%.6f", as.numeric(logLik(btmodel(preference, undecided = FALSE, epsilon = 1e-12)))), "")
}
